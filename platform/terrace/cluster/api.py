"""Calls to the Kubernetes API: plain dictionaries in and out, errors with a meaning.

The maintained `kubernetes` client signs and sends every request (`credentials.py` builds it), so tokens, exec plugins, client
certificates, proxies and rotating files are its affair; what this file adds is paths and meanings. The generated classes per
kind are not used: they know no Curriculum and no RayJob, and change their signatures between versions, while the REST paths are
stable for years. `Conflict`: somebody wrote in between; `AlreadyExists`; `Refused`: a schema, webhook, quota or missing right
said no; `KindAbsent`: the cluster has no such kind; `ApiError`: trying again may help.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlencode

from terrace.errors import TerraceError

logger = logging.getLogger("terrace.api")
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


class KindAbsent(ApiError):
    """The API server serves no such kind: its CustomResourceDefinition is not installed."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"the cluster does not know the kind {kind} ({KINDS[kind].group_version})", 404)
        self.kind = kind


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
CUSTOM = ("Curriculum", "RayJob", "Workload")  # served only where somebody has installed their CustomResourceDefinitions
JSON = "application/json"
# By default the API server drops what it does not know and answers 201 (kubernetes.io/docs/reference/using-api/api-concepts,
# "Field validation"): a misspelt key would be lost in silence.
STRICT = {"fieldValidation": "Strict"}


class Sends(Protocol):
    """One signed request; `terrace.cluster.credentials.Client`. Raises ApiError where no answer came."""

    def __call__(self, method: str, url: str, body: Manifest | None, content_type: str, stream: bool) -> Any: ...


class Api:
    """Calls in one namespace. Safe to use from several threads."""

    def __init__(self, send: Sends, namespace: str, on_call: Callable[[str, str, int], None] | None = None) -> None:
        self.namespace, self._send, self._on_call = namespace, send, on_call
        self._warned: set[str] = set()

    def get(self, kind: str, name: str) -> Manifest | None:
        """The object, or None where there is none. KindAbsent where there can be none."""
        try:
            return self._call("GET", kind, KINDS[kind].path(self.namespace, name))
        except KindAbsent:
            raise
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def list(self, kind: str, selector: str = "") -> list[Manifest]:
        """All objects of a kind in the namespace, in pages of 500. KindAbsent where its CRD is not installed."""
        items: list[Manifest] = []
        token = ""
        while True:
            query = {"limit": "500"} | ({"labelSelector": selector} if selector else {}) | ({"continue": token} if token else {})
            page = self._call("GET", kind, KINDS[kind].path(self.namespace), query=query)
            identity = {"apiVersion": KINDS[kind].group_version, "kind": kind}
            items += [identity | item for item in page.get("items", ())]
            token = page.get("metadata", {}).get("continue", "")
            if not token:
                return items

    def knows(self, kind: str) -> bool:
        """Whether the API server serves this kind. A kind that may not be listed here is known all the same."""
        try:
            self._call("GET", kind, KINDS[kind].path(self.namespace), query={"limit": "1"})
        except KindAbsent:
            return False
        except Refused:
            return True
        return True

    def create(self, body: Manifest) -> Manifest:
        """AlreadyExists where the name is taken; Refused where the server will not have it."""
        return self._call("POST", body["kind"], KINDS[body["kind"]].path(self.namespace), body, STRICT)

    def replace_status(self, body: Manifest) -> Manifest:
        """Write the status; Conflict if the object is no longer the one that was read. A field that an older CRD lacks is logged."""
        return self._put(body, "status", {"fieldValidation": "Warn"})

    def replace(self, body: Manifest) -> Manifest:
        """Write the object (not its status); Conflict if it is no longer the one that was read."""
        return self._put(body, "", STRICT)

    def patch(self, kind: str, name: str, change: Manifest) -> Manifest:
        """JSON merge patch. With `metadata.resourceVersion` in the change: Conflict if it is no longer that one."""
        path = KINDS[kind].path(self.namespace, name)
        return self._call("PATCH", kind, path, change, STRICT, "application/merge-patch+json")

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

    def pod_log(self, name: str, follow: bool = False) -> Iterator[str]:
        """Lines that the pod's container has written so far; with `follow` also those that it writes from now on."""
        path = KINDS["Pod"].path(self.namespace, name, "log") + ("?follow=true" if follow else "")
        response = self._send("GET", path, None, JSON, True)
        if response.status >= 300:
            raise _error("GET", "Pod", path, response.status, response.data)
        for line in response:
            yield line.decode("utf-8", "replace").rstrip("\n")

    def _put(self, body: Manifest, subresource: str, query: dict[str, str]) -> Manifest:
        path = KINDS[body["kind"]].path(self.namespace, body["metadata"]["name"], subresource)
        return self._call("PUT", body["kind"], path, body, query)

    def _call(
        self, method: str, kind: str, path: str, body: Manifest | None = None, query: dict[str, str] | None = None,
        content_type: str = JSON,
    ) -> Manifest:  # fmt: skip
        response = self._send(method, path + ("?" + urlencode(query) if query else ""), body, content_type, False)
        code, raw = response.status, response.data
        if self._on_call:
            self._on_call(method, kind, code)
        for warning in response.headers.getlist("Warning") if code < 300 else ():
            if warning not in self._warned and len(self._warned) < 1000:
                self._warned.add(warning)
                logger.warning("%s %s: the API server warns: %s", method, path, warning)
        if code < 300:
            return json.loads(raw) if raw else {}
        raise _error(method, kind, path, code, raw)


def _error(method: str, kind: str, path: str, code: int, raw: bytes) -> ApiError:
    try:
        status = json.loads(raw)
        message, reason = str(status.get("message", "")), str(status.get("reason", ""))
        named = bool((status.get("details") or {}).get("name"))
    except (ValueError, AttributeError):
        message, reason, named = raw[:300].decode("utf-8", "replace").strip(), "", False
    if code == 404 and not named and kind in CUSTOM:
        return KindAbsent(kind)  # a missing object is named in the answer; a missing kind is "404 page not found"
    text = f"{method} {path}: {code} {reason}: {message}"
    if code == 401:
        return ApiError(f"{method} {path}: the API server does not accept the credentials (401): log in again, or renew the token", code)
    if code == 403 and "system:anonymous" in message:
        message += " (no credentials were sent: the kubeconfig's user has none, or its exec plugin failed)"
    if code == 409:
        return (AlreadyExists if reason == "AlreadyExists" else Conflict)(text, code)
    if code in (400, 403, 413, 422):
        return Refused(message or text, code)
    return ApiError(text, code)
