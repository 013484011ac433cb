"""Who we are to the API server: the cluster this process runs in, or the current kubeconfig context.

The only file that imports the `kubernetes` package. Its `ApiClient` is what `kubectl`-like tools in Python use: it adds the bearer
token to every request (and reads a ServiceAccount's rotating file again every minute), runs exec plugins again when their token
expires, presents client certificates and honours proxies. What it lacks is added here: an answer of 401 makes the credentials be
loaded anew, once, as client-go does; that covers a revoked token, a `tokenFile` that was replaced and certificates that an
exec plugin made.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from terrace.cluster.api import Api, ApiError
from terrace.errors import InputError

NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
CALL_SECONDS, STREAM_SECONDS = 30.0, 600.0
CONNECTIONS = 16


def connect(namespace: str | None = None, on_call: Callable[[str, str, int], None] | None = None) -> Api:
    """The API of the cluster this process runs in, else of the current kubeconfig context. InputError where there is neither."""
    client = Client()
    return Api(client, namespace or client.namespace, on_call)


class Client:
    """Sends signed requests; credentials are loaded at the start and again when the server no longer accepts them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client, self.namespace = _load()

    def __call__(self, method: str, url: str, body: Any, content_type: str, stream: bool) -> Any:
        """The response of urllib3: `status`, `data`, `headers`; with `stream` its body is read by the caller, line by line."""
        client = self._client
        response = _send(client, method, url, body, content_type, stream)
        if response.status != 401:
            return response
        response.drain_conn()
        with self._lock:
            if self._client is client:
                self._client, _ = _load()
            client = self._client
        return _send(client, method, url, body, content_type, stream)


def _send(client: Any, method: str, url: str, body: Any, content_type: str, stream: bool) -> Any:
    import urllib3
    from kubernetes.client.exceptions import ApiException
    from kubernetes.config import ConfigException

    headers = {"Accept": "application/json", "Content-Type": content_type} if body is not None else {"Accept": "application/json"}
    try:
        request = client.param_serialize(method, url, header_params=headers, body=body, auth_settings=["BearerToken"])
        response = client.call_api(*request, _request_timeout=STREAM_SECONDS if stream else CALL_SECONDS).response
        if not stream:
            response.data  # noqa: B018  read here, so that a connection lost meanwhile is this call's error
    except (urllib3.exceptions.HTTPError, ApiException, ConfigException, OSError) as error:
        raise ApiError(f"{method} {url.partition('?')[0]}: {error}") from error
    return response


def _load() -> tuple[Any, str]:
    """An ApiClient of the package and the namespace that the context names."""
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise InputError("the Kubernetes launcher needs the package `kubernetes`: pip install 'terrace[kubernetes]'") from error
    configuration = client.Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=configuration)
            with open(NAMESPACE_FILE, encoding="utf-8") as file:
                namespace = file.read().strip()
        else:
            # Named here: the package reads KUBECONFIG only once, when it is imported.
            file = os.environ.get("KUBECONFIG")
            config.load_kube_config(config_file=file, client_configuration=configuration)
            context = config.list_kube_config_contexts(config_file=file)[1]
            namespace = context["context"].get("namespace") or "default"
    except (config.ConfigException, OSError) as error:
        raise InputError(f"no Kubernetes cluster: {error}. Set KUBECONFIG or run inside a cluster") from error
    configuration.retries = False  # whoever calls knows whether a call may be made twice
    configuration.connection_pool_maxsize = CONNECTIONS
    made = client.ApiClient(configuration)
    made.user_agent = "terrace"
    return made, namespace
