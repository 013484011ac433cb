"""A small client of the Kubernetes API: the only file that imports the `kubernetes` package, and it only for credentials.

Objects are plain dictionaries. Requests go through urllib3 directly: the generated client has a class per kind and changes
its call signatures between versions, while the REST paths it would build are stable for years. Errors carry a meaning:
`Conflict` (somebody wrote in between), `AlreadyExists`, `Refused` (a webhook, quota or schema said no), `ApiError` (try again).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from terrace.errors import InputError, TerraceError

Manifest = dict[str, Any]


class ApiError(TerraceError):
    """The API server could not be reached or answered with an error; trying again later may help."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Conflict(ApiError):
    """The object changed since it was read (stale resourceVersion), or its uid is another."""


class AlreadyExists(ApiError):
    """An object of that name is there already."""


class Refused(ApiError):
    """The API server will not accept the object as it is: schema, admission webhook, quota or missing rights."""


@dataclass(frozen=True)
class Kind:
    group_version: str
    plural: str

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        root = f"/api/{self.group_version}" if "/" not in self.group_version else f"/apis/{self.group_version}"
        space = f"/namespaces/{namespace}" if namespace else ""
        return root + space + f"/{self.plural}" + (f"/{name}" if name else "") + (f"/{subresource}" if subresource else "")


KINDS: dict[str, Kind] = {
    "Curriculum": Kind("terrace.dev/v1alpha1", "curricula"),
    "RayJob": Kind("ray.io/v1", "rayjobs"),
    "Workload": Kind("kueue.x-k8s.io/v1beta2", "workloads"),
    "ConfigMap": Kind("v1", "configmaps"),
    "Event": Kind("v1", "events"),
    "ServiceAccount": Kind("v1", "serviceaccounts"),
    "Namespace": Kind("v1", "namespaces"),
    "Pod": Kind("v1", "pods"),
    "Role": Kind("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": Kind("rbac.authorization.k8s.io/v1", "rolebindings"),
    "PodDisruptionBudget": Kind("policy/v1", "poddisruptionbudgets"),
    "Lease": Kind("coordination.k8s.io/v1", "leases"),
    "CustomResourceDefinition": Kind("apiextensions.k8s.io/v1", "customresourcedefinitions"),
}


class Api:
    """Calls in one namespace. Safe to use from several threads."""

    def __init__(self, configuration: Any, namespace: str, on_call: Callable[[str, str, int], None] | None = None) -> None:
        import urllib3

        self.namespace, self._configuration, self._on_call = namespace, configuration, on_call
        options: dict[str, Any] = {"maxsize": 16, "retries": False}
        if configuration.host.startswith("https"):
            options |= {
                "cert_reqs": "CERT_REQUIRED" if configuration.verify_ssl else "CERT_NONE",
                "ca_certs": configuration.ssl_ca_cert, "cert_file": configuration.cert_file, "key_file": configuration.key_file,
            }  # fmt: skip
        self._pool = urllib3.PoolManager(**options)
        self._http_error = urllib3.exceptions.HTTPError

    def get(self, kind: str, name: str) -> Manifest | None:
        """The object, or None where there is none."""
        try:
            return self._call("GET", kind, KINDS[kind].path(self.namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def list(self, kind: str, selector: str = "") -> list[Manifest]:
        """All objects of a kind in the namespace, in pages of 500. A kind whose CRD is absent has none."""
        items: list[Manifest] = []
        token = ""
        while True:
            query = {"limit": "500"} | ({"labelSelector": selector} if selector else {}) | ({"continue": token} if token else {})
            try:
                page = self._call("GET", kind, KINDS[kind].path(self.namespace), query=query)
            except ApiError as error:
                if error.code == 404:
                    return []
                raise
            identity = {"apiVersion": KINDS[kind].group_version, "kind": kind}
            items += [identity | item for item in page.get("items", ())]
            token = page.get("metadata", {}).get("continue", "")
            if not token:
                return items

    def probe(self, kind: str) -> None:
        """ApiError unless objects of this kind can be listed here."""
        self._call("GET", kind, KINDS[kind].path(self.namespace), query={"limit": "1"})

    def create(self, body: Manifest) -> Manifest:
        """AlreadyExists where the name is taken; Refused where the server will not have it."""
        return self._call("POST", body["kind"], KINDS[body["kind"]].path(self.namespace), body)

    def replace_status(self, body: Manifest) -> Manifest:
        """Write the status; Conflict if the object is no longer the one that was read."""
        return self._put(body, "status")

    def replace(self, body: Manifest) -> Manifest:
        """Write the object (not its status); Conflict if it is no longer the one that was read."""
        return self._put(body, "")

    def patch(self, kind: str, name: str, change: Manifest) -> Manifest:
        """JSON merge patch. With `metadata.resourceVersion` in the change: Conflict if it is no longer that one."""
        path = KINDS[kind].path(self.namespace, name)
        return self._call("PATCH", kind, path, change, content_type="application/merge-patch+json")

    def delete(self, kind: str, name: str, uid: str | None = None, foreground: bool = False) -> None:
        """Delete; nothing happens where there is none or it is another object than `uid`."""
        options: Manifest = {"apiVersion": "v1", "kind": "DeleteOptions"}
        options["propagationPolicy"] = "Foreground" if foreground else "Background"
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            self._call("DELETE", kind, KINDS[kind].path(self.namespace, name), options)
        except Conflict:
            return
        except ApiError as error:
            if error.code != 404:
                raise

    def pod_log(self, name: str) -> Iterator[str]:
        """Lines that the pod's container has written so far."""
        response = self._request("GET", KINDS["Pod"].path(self.namespace, name, "log"), None, None, stream=True)
        for line in response:
            yield line.decode("utf-8", "replace").rstrip("\n")

    def watch(self, kind: str, resource_version: str = "", timeout_seconds: int = 300) -> Iterator[Manifest]:
        """Events of a kind until the server ends the watch (used by `terrace` to follow; the operator watches through kopf)."""
        query = {"watch": "true", "timeoutSeconds": str(timeout_seconds), "allowWatchBookmarks": "true"}
        if resource_version:
            query["resourceVersion"] = resource_version
        response = self._request("GET", KINDS[kind].path(self.namespace) + "?" + urlencode(query), None, None, stream=True)
        buffer = b""
        for chunk in response.stream(4096):
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                if line.strip():
                    yield json.loads(line)

    def _put(self, body: Manifest, subresource: str) -> Manifest:
        path = KINDS[body["kind"]].path(self.namespace, body["metadata"]["name"], subresource)
        return self._call("PUT", body["kind"], path, body)

    def _call(
        self, method: str, kind: str, path: str, body: Manifest | None = None, query: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Manifest:  # fmt: skip
        url = path + ("?" + urlencode(query) if query else "")
        try:
            response = self._request(method, url, body, content_type)
            code, raw = response.status, response.data
        except self._http_error as error:
            raise ApiError(f"{method} {path}: {error}") from error
        if self._on_call:
            self._on_call(method, kind, code)
        if code < 300:
            return json.loads(raw) if raw else {}
        raise _error(method, path, code, raw)

    def _request(self, method: str, url: str, body: Manifest | None, content_type: str | None, stream: bool = False) -> Any:
        headers = {"Accept": "application/json", "User-Agent": "terrace"}
        if token := self._configuration.get_api_key_with_prefix("authorization"):
            headers["Authorization"] = token
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), content_type or "application/json"
        return self._pool.request(
            method, self._configuration.host + url, body=data, headers=headers, preload_content=not stream,
            timeout=600.0 if stream else 30.0,
        )  # fmt: skip


def _error(method: str, path: str, code: int, raw: bytes) -> ApiError:
    try:
        status = json.loads(raw)
        message, reason = str(status.get("message", "")), str(status.get("reason", ""))
    except (ValueError, AttributeError):
        message, reason = raw[:300].decode("utf-8", "replace"), ""
    text = f"{method} {path}: {code} {reason}: {message}"
    if code == 409:
        return (AlreadyExists if reason == "AlreadyExists" else Conflict)(text, code)
    if code in (400, 403, 413, 422):
        return Refused(message or text, code)
    return ApiError(text, code)


def connect(namespace: str | None = None, on_call: Callable[[str, str, int], None] | None = None) -> Api:
    """The API of the cluster this process runs in, else of the current kubeconfig context. InputError where there is neither."""
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise InputError("the Kubernetes launcher needs the package `kubernetes`: pip install 'terrace[kubernetes]'") from error
    configuration = client.Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=configuration)
            with open("/var/run/secrets/kubernetes.io/serviceaccount/namespace", encoding="utf-8") as file:
                found = file.read().strip()
        else:
            # Named here: the package reads KUBECONFIG only once, when it is imported.
            file = os.environ.get("KUBECONFIG")
            config.load_kube_config(config_file=file, client_configuration=configuration)
            context = config.list_kube_config_contexts(config_file=file)[1]
            found = context["context"].get("namespace", "default")
    except config.ConfigException as error:
        raise InputError(f"no Kubernetes cluster: {error}. Set KUBECONFIG or run inside a cluster") from error
    return Api(configuration, namespace or found, on_call)
