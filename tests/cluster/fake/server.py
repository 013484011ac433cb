"""The fake API server over HTTP, close enough for kopf, kubectl and our own client: discovery, lists, watches, patches, deletes."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from typing import Any

import yaml
from aiohttp import web

from fake.kuberay import Cluster
from fake.store import Gone, Store, install_crd
from terrace.cluster.api import KINDS, AlreadyExists, ApiError, Conflict

Manifest = dict[str, Any]
KINDS_SERVED = {
    **{kind: (item.group_version, item.plural) for kind, item in KINDS.items()},
    "RayCluster": ("ray.io/v1", "rayclusters"),
}
BY_PATH = {pair: kind for kind, pair in KINDS_SERVED.items()}
SHORT = {"Curriculum": ["cur"], "ConfigMap": ["cm"]}


def status_body(code: int, reason: str, message: str) -> Manifest:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }


def failure(error: ApiError) -> web.Response:
    reasons = {404: "NotFound", 409: "AlreadyExists" if isinstance(error, AlreadyExists) else "Conflict", 410: "Expired",
               422: "Invalid", 403: "Forbidden", 400: "BadRequest"}  # fmt: skip
    return web.json_response(status_body(error.code, reasons.get(error.code, "Error"), str(error)), status=error.code)


class Server:
    """Serves one Store; every namespace of a URL is the same one. A thread ticks the simulated KubeRay and Kueue."""

    def __init__(self, crd: Manifest, tick_seconds: float = 0.03) -> None:
        self.crd = crd
        self.store = Store()
        install_crd(self.store, crd)
        self.store.create({**crd})
        self.cluster = Cluster(self.store)
        self.tick_seconds = tick_seconds
        self.bookmark_seconds = 1.0
        self.requests = 0
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

    def kubeconfig(self, namespace: str = "default") -> str:
        return yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "fake", "user": {}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": namespace}}],
        })  # fmt: skip

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        self._loop.run_forever()

    def _tick(self) -> None:
        while not self._stop.wait(self.tick_seconds):
            with self.store.lock:
                self.cluster.tick(time.monotonic())

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        parts = [part for part in request.path.split("/") if part]
        try:
            found = discovery(parts)
            if found is not None:
                return web.json_response(found)
            return await self._resource(request, parts)
        except ApiError as error:
            return failure(error)
        except (KeyError, ValueError) as error:
            return web.json_response(status_body(404, "NotFound", f"{request.path}: {error!r}"), status=404)

    async def _resource(self, request: web.Request, parts: list[str]) -> web.StreamResponse:
        version, rest = (parts[1], parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        if rest[:1] == ["namespaces"] and len(rest) >= 3:
            rest = rest[2:]
        kind = BY_PATH[version, rest[0]]
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
            if kind == "Curriculum" and "as=Table" in request.headers.get("Accept", ""):
                return web.json_response(table(self.crd, [body]))
            return web.json_response(body)
        data = await request.read()
        body = (yaml.safe_load(data) or {}) if data else {}
        strict = query.get("fieldValidation", "Strict") == "Strict"
        if method == "POST":
            if query.get("dryRun"):
                return web.json_response(body, status=201)
            return web.json_response(self.store.create({**body, "apiVersion": version, "kind": kind}, strict), status=201)
        if method == "PUT":
            body = {**body, "apiVersion": version, "kind": kind}
            call = self.store.replace_status if subresource == "status" else self.store.replace
            return web.json_response(call(body))
        if method == "PATCH":
            return web.json_response(self.store.patch(kind, name, body, subresource))
        known = self.store.get(kind, name)
        if known is None:
            raise ApiError(f'{rest[0]} "{name}" not found', 404)
        uid = (body.get("preconditions") or {}).get("uid")
        if uid and uid != known["metadata"]["uid"]:
            raise Conflict(f"Precondition failed: UID {uid}", 409)
        self.store.delete(kind, name, foreground=body.get("propagationPolicy") == "Foreground")
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


def discovery(parts: list[str]) -> Manifest | None:
    """What clients ask to learn which kinds there are."""
    groups = sorted({version for version, _ in BY_PATH if "/" in version})
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
    if version is None or parts[0] not in ("api", "apis") or not any(v == version for v, _ in BY_PATH):
        return None
    resources = []
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    for (served, plural), kind in BY_PATH.items():
        if served == version:
            cluster_wide = kind in ("Namespace", "CustomResourceDefinition")
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
