"""The fake API server over HTTPS, close enough for kopf, kubectl and our own client: discovery, lists, watches, patches, deletes.

Every request is authenticated and its right decided (`access.py`). As on the real one, a request without `fieldValidation` drops
unknown fields with a warning (kubernetes.io/docs/reference/using-api/api-concepts, "Field validation"), and a kind whose
CustomResourceDefinition is absent is "404 page not found", not a Status.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from fake.access import ANONYMOUS, Access, Ask, User
from fake.certificates import Authority
from fake.kuberay import Cluster
from fake.schema import unknown_fields
from fake.store import Gone, Store, install_crd
from terrace.cluster.api import KINDS, AlreadyExists, ApiError, Conflict, KindAbsent

Manifest = dict[str, Any]
KINDS_SERVED = {
    **{kind: (item.group_version, item.plural) for kind, item in KINDS.items()},
    "RayCluster": ("ray.io/v1", "rayclusters"),
    "ClusterRole": ("rbac.authorization.k8s.io/v1", "clusterroles"),
    "ClusterRoleBinding": ("rbac.authorization.k8s.io/v1", "clusterrolebindings"),
}
CLUSTER_WIDE = ("Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding")
BY_PATH = {pair: kind for kind, pair in KINDS_SERVED.items()}
SHORT = {"Curriculum": ["cur"], "ConfigMap": ["cm"]}


def status_body(code: int, reason: str, message: str, name: str = "") -> Manifest:
    details = {"details": {"name": name}} if name else {}
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message} | details


def failure(error: ApiError, name: str) -> web.Response:
    if isinstance(error, KindAbsent):
        return web.Response(text="404 page not found\n", status=404)
    reasons = {404: "NotFound", 409: "AlreadyExists" if isinstance(error, AlreadyExists) else "Conflict", 410: "Expired",
               422: "Invalid", 401: "Unauthorized", 403: "Forbidden", 400: "BadRequest"}  # fmt: skip
    return web.json_response(status_body(error.code, reasons.get(error.code, "Error"), str(error), name), status=error.code)


class Server:
    """Serves one Store, which is one namespace; others are empty. A thread ticks the simulated KubeRay and Kueue."""

    def __init__(self, crd: Manifest, tick_seconds: float = 0.03, namespace: str = "default") -> None:
        self.crd = crd
        self.store = Store(namespace=namespace)
        self.access = Access(self.store)
        self.folder = Path(tempfile.mkdtemp(prefix="fake-api-"))
        self.authority = Authority(self.folder)
        install_crd(self.store, crd)
        self.store.create({**crd})
        self.cluster = Cluster(self.store)
        self.tick_seconds = tick_seconds
        self.bookmark_seconds = 1.0
        self.requests: list[tuple[str, str, str, str]] = []  # user, method, path, query
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self.url = ""

    def __enter__(self) -> Server:
        threading.Thread(target=self._serve, daemon=True).start()
        self._ready.wait(10)
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def kubeconfig(self, namespace: str = "", **user: Any) -> str:
        """A kubeconfig of an administrator, or with these credentials (`token`, `tokenFile`, `exec`, `client-certificate`, ...)."""
        return yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url, "certificate-authority": str(self.authority.file)}}],
            "users": [{"name": "fake", "user": user or {"token": self.access.admin_token()}}],
            "contexts": [{"name": "fake", "context": {
                "cluster": "fake", "user": "fake", "namespace": namespace or self.store.namespace}}],
        })  # fmt: skip

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.authority.file))
        context.load_cert_chain(*self.authority.issue("fake-api", server=True))
        context.verify_mode = ssl.CERT_OPTIONAL  # who shows no certificate may have a token
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        self._loop.run_until_complete(site.start())
        self.url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        self._loop.run_forever()

    def _tick(self) -> None:
        while not self._stop.wait(self.tick_seconds):
            with self.store.lock:
                self.cluster.tick(time.monotonic())

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        parts = [part for part in request.path.split("/") if part]
        name = ""
        try:
            user = self.access.who(request.headers.get("Authorization", ""), certificate_user(request))
            self.requests.append((user.name, request.method, request.path, request.query_string))
            found = discovery(parts, self.store.absent)
            if found is not None and (user.name != ANONYMOUS or parts == ["version"]):
                return web.json_response(found)
            version, namespace, rest = split(parts)
            kind = BY_PATH.get((version, rest[0] if rest else ""))
            if kind is None or kind in self.store.absent:
                return web.Response(text="404 page not found\n", status=404)
            name = rest[1] if len(rest) > 1 else ""
            ask = asked(request, version, namespace, rest)
            self.access.check(user, ask)
            if namespace not in ("", self.store.namespace):
                return self._elsewhere(request, kind, rest, namespace)
            return await self._resource(request, user, ask, kind, version, rest)
        except ApiError as error:
            return failure(error, name)
        except (KeyError, ValueError) as error:
            return web.json_response(status_body(404, "NotFound", f"{request.path}: {error!r}", name or "?"), status=404)

    def _elsewhere(self, request: web.Request, kind: str, rest: list[str], namespace: str) -> web.Response:
        """A namespace that does not exist: lists are empty, nothing can be made there."""
        if request.method == "GET" and len(rest) == 1 and request.query.get("watch") not in ("1", "true"):
            return web.json_response({"kind": f"{kind}List", "apiVersion": KINDS_SERVED[kind][0],
                                      "metadata": {"resourceVersion": "1"}, "items": []})  # fmt: skip
        raise ApiError(f'namespaces "{namespace}" not found', 404)

    async def _resource(self, request: web.Request, user: User, ask: Ask, kind: str, version: str,
                        rest: list[str]) -> web.StreamResponse:  # fmt: skip
        name, subresource = (rest[1] if len(rest) > 1 else ""), (rest[2] if len(rest) > 2 else "")
        method, query = request.method, request.query
        if method == "GET" and not name:
            if query.get("watch") in ("1", "true"):
                return await self._watch(request, kind)
            listed = self._list(kind, query.get("labelSelector", ""))
            if kind == "Curriculum" and "as=Table" in request.headers.get("Accept", ""):
                return web.json_response(table(self.crd, listed["items"]))
            return web.json_response(listed)
        if method == "GET":
            body = self.store.get(kind, name)
            if body is None:
                raise ApiError(f'{rest[0]} "{name}" not found', 404)
            if subresource == "log":
                return web.Response(text=body["metadata"].get("annotations", {}).get("log", ""))
            if kind == "Curriculum" and "as=Table" in request.headers.get("Accept", ""):
                return web.json_response(table(self.crd, [body]))
            return web.json_response(body)
        data = await request.read()
        body = (yaml.safe_load(data) or {}) if data else {}
        if method == "DELETE":
            return self._delete(kind, name, rest, body)
        strict = query.get("fieldValidation", "Warn")
        if method == "PATCH":
            if request.content_type not in ("application/merge-patch+json", "application/apply-patch+yaml"):
                raise ApiError(f"the body of the request was in an unknown format - {request.content_type}", 415)
            self.access.admit(user, ask.verb, {"kind": kind, "metadata": {"name": name}, **body})
            return web.json_response(self.store.patch(kind, name, body, subresource, strict == "Strict"))
        body = {**body, "apiVersion": version, "kind": kind}
        self.access.admit(user, ask.verb, body)
        headers = warnings(self.store.schemas.get(kind), body) if strict == "Warn" else {}
        if method == "POST":
            call = self.store.dry_run if query.get("dryRun") else self.store.create
            return web.json_response(call(body, strict == "Strict"), status=201, headers=headers)
        replaced = self.store.replace_status(body) if subresource == "status" else self.store.replace(body, strict == "Strict")
        return web.json_response(replaced, headers=headers)

    def _delete(self, kind: str, name: str, rest: list[str], options: Manifest) -> web.Response:
        known = self.store.get(kind, name)
        if known is None:
            raise ApiError(f'{rest[0]} "{name}" not found', 404)
        uid = (options.get("preconditions") or {}).get("uid")
        if uid and uid != known["metadata"]["uid"]:
            raise Conflict(f"Precondition failed: UID {uid}", 409)
        self.store.delete(kind, name, foreground=options.get("propagationPolicy") == "Foreground")
        return web.json_response(self.store.get(kind, name) or {"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _list(self, kind: str, selector: str) -> Manifest:
        with self.store.lock:
            items = self.store.list(kind, selector)
            metadata = {"resourceVersion": str(self.store.version)}
        return {"kind": f"{kind}List", "apiVersion": KINDS_SERVED[kind][0], "metadata": metadata, "items": items}

    async def _watch(self, request: web.Request, kind: str) -> web.StreamResponse:
        """Events after a position, bookmarks where nothing happens, 410 where the position is forgotten."""
        from fake.store import matches

        query = request.query
        position = int(query.get("resourceVersion") or 0)
        selector = query.get("labelSelector", "")
        end = time.monotonic() + float(query.get("timeoutSeconds", 300))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        bookmark = time.monotonic() + self.bookmark_seconds

        async def send(change: str, body: Manifest) -> None:
            if request.transport is None or request.transport.is_closing():
                raise asyncio.CancelledError  # the client has gone
            await response.write(json.dumps({"type": change, "object": body}).encode() + b"\n")

        while not self._stop.is_set() and time.monotonic() < end:
            try:
                with self.store.lock:
                    changes, newest = self.store.since(kind, position), self.store.version
            except Gone as error:
                await send("ERROR", status_body(410, "Expired", str(error)))
                return response
            for change in changes:
                if matches(selector, change.body):
                    await send(change.kind, change.body)
            position = newest
            if time.monotonic() > bookmark and query.get("allowWatchBookmarks") == "true":
                bookmark = time.monotonic() + self.bookmark_seconds
                await send("BOOKMARK", {"kind": kind, "apiVersion": KINDS_SERVED[kind][0],
                                        "metadata": {"resourceVersion": str(position)}})  # fmt: skip
            await asyncio.sleep(0.02)
        return response


def certificate_user(request: web.Request) -> User | None:
    """The user of a client certificate: common name and organisations."""
    certificate = request.transport.get_extra_info("peercert") if request.transport else None
    fields = [pair for part in (certificate or {}).get("subject", ()) for pair in part]
    names = [value for key, value in fields if key == "commonName"]
    return User(names[0], tuple(value for key, value in fields if key == "organizationName")) if names else None


def split(parts: list[str]) -> tuple[str, str, list[str]]:
    """API version, namespace (empty: none), and the rest of a path."""
    version, rest = (parts[1], parts[2:]) if parts[:1] == ["api"] and len(parts) > 1 else ("/".join(parts[1:3]), parts[3:])
    if rest[:1] == ["namespaces"] and len(rest) >= 3:
        return version, rest[1], rest[2:]
    return version, "", rest


def asked(request: web.Request, version: str, namespace: str, rest: list[str]) -> Ask:
    """The request's attributes for authorisation (kubernetes.io/docs/reference/access-authn-authz/authorization, "Determine the verb")."""
    watched = request.query.get("watch") in ("1", "true")
    reading = "get" if len(rest) > 1 else "watch" if watched else "list"
    verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(request.method, reading)
    group = version.partition("/")[0] if "/" in version else ""
    resource = rest[0] + (f"/{rest[2]}" if len(rest) > 2 else "")
    return Ask(verb, group, resource, namespace, rest[1] if len(rest) > 1 else "")


def warnings(schema: Manifest | None, body: Manifest) -> dict[str, str]:
    unknown = unknown_fields(body, schema) if schema else []
    return {"Warning": f'299 - "unknown field \\"{unknown[0]}\\""'} if unknown else {}


def discovery(parts: list[str], absent: set[str]) -> Manifest | None:
    """What clients ask to learn which kinds there are."""
    served_kinds = {pair: kind for pair, kind in BY_PATH.items() if kind not in absent}
    groups = sorted({version for version, _ in served_kinds if "/" in version})
    if parts == ["version"]:
        return {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
    if parts == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"]}
    if parts == ["apis"]:
        listed = []
        for group in sorted({version.split("/")[0] for version in groups}):
            versions = [{"groupVersion": v, "version": v.split("/")[1]} for v in groups if v.startswith(group + "/")]
            listed.append({"name": group, "versions": versions, "preferredVersion": versions[0]})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    version = parts[1] if parts[:1] == ["api"] and len(parts) == 2 else "/".join(parts[1:]) if len(parts) == 3 else None
    if version is None or parts[0] not in ("api", "apis") or not any(v == version for v, _ in served_kinds):
        return None
    resources = []
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    for (served, plural), kind in served_kinds.items():
        if served == version:
            cluster_wide = kind in CLUSTER_WIDE
            resources.append({"name": plural, "singularName": kind.lower(), "namespaced": not cluster_wide, "kind": kind,
                              "verbs": verbs, "shortNames": SHORT.get(kind, [])})  # fmt: skip
            if kind in ("Curriculum", "RayJob"):
                resources.append({"name": f"{plural}/status", "singularName": "", "namespaced": True, "kind": kind,
                                  "verbs": ["get", "patch", "update"]})  # fmt: skip
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def table(crd: Manifest, items: list[Manifest]) -> Manifest:
    """What `kubectl get` shows: the CRD's printer columns."""
    columns = crd["spec"]["versions"][0]["additionalPrinterColumns"]
    definitions = [{"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0}]
    definitions += [{"name": c["name"], "type": c["type"], "format": "", "description": c["description"],
                     "priority": c.get("priority", 0)} for c in columns]  # fmt: skip
    rows = [{"cells": [item["metadata"]["name"], *(cell(item, c["jsonPath"]) for c in columns)], "object": {
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]}} for item in items]  # fmt: skip
    return {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": "1"},
            "columnDefinitions": definitions, "rows": rows}  # fmt: skip


def cell(item: Manifest, path: str) -> Any:
    """The JSONPath that printer columns use: fields, and one filter by type."""
    value: Any = item
    for part in re.findall(r"\.(\w+)|\[\?\(@\.type=='(\w+)'\)\]", path):
        field, wanted = part
        if field:
            value = value.get(field) if isinstance(value, dict) else None
        else:
            value = next((entry for entry in value or () if entry["type"] == wanted), None)
    return value
