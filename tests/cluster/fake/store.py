"""The storage and semantics of an API server: resourceVersions, status subresource, watches, finalizers, garbage collection.

Objects are never changed in place: every write stores a new dictionary, so readers may keep what they got. Only what the operator
and its tests rely on is here, but that strictly: a stale resourceVersion is a conflict, a status write changes nothing else, an
old watch position is Gone, a deletion waits for finalizers and (foreground) for dependents.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fake import crd_rules, object_meta
from fake import schema as crd_schema
from terrace.cluster.api import KINDS, AlreadyExists, ApiError, Conflict, KindAbsent, Refused

Manifest = dict[str, Any]
FOREGROUND = "foregroundDeletion"
HISTORY = 2000  # events per kind that a watch can still start from


class Gone(ApiError):
    """The watch position is too old."""


@dataclass
class Change:
    version: int
    kind: str  # of the change: ADDED, MODIFIED, DELETED
    body: Manifest


@dataclass
class Store:
    """One namespace of one cluster. `clock` gives the time that deletion and creation timestamps carry."""

    namespace: str = "default"
    clock: Callable[[], float] = time.time
    history: int = HISTORY
    version: int = 0
    objects: dict[str, dict[str, Manifest]] = field(default_factory=dict)
    changes: dict[str, list[Change]] = field(default_factory=dict)
    compacted: dict[str, int] = field(default_factory=dict)
    schemas: dict[str, Manifest] = field(default_factory=dict)
    admission: list[Callable[[str, Manifest, Manifest | None], Manifest | None]] = field(default_factory=list)
    listeners: list[Callable[[str, Change], None]] = field(default_factory=list)
    by_owner: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)  # kinds whose CustomResourceDefinition is not installed

    def __post_init__(self) -> None:
        self.lock = threading.RLock()

    # ------------------------------------------------------------ reading

    def get(self, kind: str, name: str) -> Manifest | None:
        self._count("get", kind)
        with self.lock:
            return self.objects.get(kind, {}).get(name)

    def list(self, kind: str, selector: str = "") -> list[Manifest]:
        self._count("list", kind)
        with self.lock:
            if kind == "RayJob" and selector.startswith("terrace.dev/curriculum="):
                return self._of_curriculum(kind, selector.split("=", 1)[1])
            return [body for body in self.objects.get(kind, {}).values() if matches(selector, body)]

    def _of_curriculum(self, kind: str, curriculum: str) -> list[Manifest]:
        owner = self.objects.get("Curriculum", {}).get(curriculum)
        if owner is None:
            return [body for body in self.objects.get(kind, {}).values() if matches(f"terrace.dev/curriculum={curriculum}", body)]
        keys = sorted(self.by_owner.get(owner["metadata"]["uid"], ()))
        return [self.objects[k][n] for k, n in keys if k == kind]

    def since(self, kind: str, version: int) -> list[Change]:
        """Changes after `version`; Gone where they are no longer known."""
        with self.lock:
            if version < self.compacted.get(kind, 0):
                raise Gone(f"too old resource version: {version} ({self.compacted[kind]})", 410)
            return [change for change in self.changes.get(kind, []) if change.version > version]

    def compact(self) -> None:
        """Forget the history, as etcd does every few minutes: watches from older positions are Gone."""
        with self.lock:
            for kind in self.changes:
                self.changes[kind] = []
                self.compacted[kind] = self.version

    # ------------------------------------------------------------ writing

    def create(self, body: Manifest, strict: bool = True) -> Manifest:
        kind = body["kind"]
        self._count("create", kind)
        with self.lock:
            name = body["metadata"].get("name") or f"{body['metadata'].get('generateName', '')}{uuid.uuid4().hex[:5]}"
            if name in ("", name[-5:]) and not body["metadata"].get("name"):
                raise Refused(f"{kind} is invalid: " + object_meta.errors({})[0], 422)
            if name in self.objects.get(kind, {}):
                raise AlreadyExists(f'{kind} "{name}" already exists', 409)
            metadata = {**body["metadata"], "name": name, "namespace": self.namespace, "uid": uuid.uuid4().hex, "generation": 1,
                        "creationTimestamp": stamp(self.clock())}  # fmt: skip
            fresh = {**body, "metadata": metadata}
            if kind in self.schemas:
                fresh.pop("status", None)
            fresh = self._admit(kind, fresh, None, strict)
            for reference in metadata.get("ownerReferences", ()):
                self.by_owner.setdefault(reference["uid"], set()).add((kind, name))
            stored = self._store("ADDED", kind, fresh)
            for reference in metadata.get("ownerReferences", ()):  # an owner that is gone: collected at once
                if not self._exists(reference):
                    self._remove(kind, stored)
                    break
            return stored

    def dry_run(self, body: Manifest, strict: bool = True) -> Manifest:
        """Everything that `create` checks, and nothing written (kubernetes.io/docs/reference/using-api/api-concepts, "Dry-run")."""
        with self.lock:
            fresh = {**body, "metadata": {**body["metadata"], "namespace": self.namespace, "uid": uuid.uuid4().hex}}
            return self._admit(body["kind"], fresh, None, strict)

    def knows(self, kind: str) -> bool:
        return kind not in self.absent

    def replace(self, body: Manifest, strict: bool = True) -> Manifest:
        self._count("update", body["kind"])
        with self.lock:
            old = self._current(body)
            fresh = {**body, "metadata": {**old["metadata"], **_editable(body["metadata"])}}
            if "status" in old and body["kind"] in self.schemas:
                fresh["status"] = old["status"]
            return self._update(old, fresh, strict)

    def replace_status(self, body: Manifest) -> Manifest:
        self._count("status", body["kind"])
        with self.lock:
            old = self._current(body)
            fresh = {**old, "status": body.get("status")}
            kind = body["kind"]
            if kind in self.schemas:  # the spec is as it was, so only the status is checked
                schema = self.schemas[kind]["properties"]["status"]
                fresh["status"] = crd_schema.prepare(fresh["status"] or {}, schema)
                if errors := crd_schema.schema_errors(fresh["status"], schema):
                    raise Refused(f'{kind} "{body["metadata"]["name"]}" is invalid: status.' + "; ".join(errors), 422)
            if fresh.get("status") == old.get("status"):
                return old
            return self._store("MODIFIED", kind, fresh)

    def patch(self, kind: str, name: str, change: Manifest, subresource: str = "", strict: bool = True) -> Manifest:
        self._count("patch", kind)
        with self.lock:
            old = self.objects.get(kind, {}).get(name)
            if old is None:
                raise ApiError(f'{KINDS[kind].plural} "{name}" not found', 404)
            wanted = change.get("metadata", {}).get("resourceVersion")
            if wanted and wanted != old["metadata"]["resourceVersion"]:
                raise Conflict(f'{kind} "{name}": the object has been modified', 409)
            merged = merge_patch(old, change)
            if subresource == "status":
                return self._store("MODIFIED", kind, {**old, "status": merged.get("status")})
            if "status" in old and kind in self.schemas:
                merged["status"] = old["status"]
            merged["metadata"] = {**old["metadata"], **_editable(merged["metadata"])}
            return self._update(old, merged, strict)

    def delete(self, kind: str, name: str, uid: str | None = None, foreground: bool = False) -> None:
        self._count("delete", kind)
        with self.lock:
            body = self.objects.get(kind, {}).get(name)
            if body is None:
                return
            if uid and body["metadata"]["uid"] != uid:
                return  # the client ignores the failed precondition
            finalizers = list(body["metadata"].get("finalizers", ()))
            if foreground and FOREGROUND not in finalizers and self._dependents(body):
                finalizers.append(FOREGROUND)
            if not finalizers:
                self._remove(kind, body)
                return
            metadata = {**body["metadata"], "finalizers": finalizers}
            metadata.setdefault("deletionTimestamp", stamp(self.clock()))
            if metadata != body["metadata"]:
                self._store("MODIFIED", kind, {**body, "metadata": metadata})
            if FOREGROUND in finalizers:
                for dependent_kind, dependent in self._dependents(body):
                    self.delete(dependent_kind, dependent, foreground=True)

    # ------------------------------------------------------------ inside

    def _count(self, verb: str, kind: str) -> None:
        if kind in self.absent:
            raise KindAbsent(kind)
        self.calls[f"{verb} {kind}"] = self.calls.get(f"{verb} {kind}", 0) + 1

    def _current(self, body: Manifest) -> Manifest:
        kind, metadata = body["kind"], body["metadata"]
        old = self.objects.get(kind, {}).get(metadata["name"])
        if old is None or (metadata.get("uid") and metadata["uid"] != old["metadata"]["uid"]):
            raise Conflict(f'{KINDS[kind].plural} "{metadata["name"]}" is gone', 409)
        if metadata.get("resourceVersion") not in (None, old["metadata"]["resourceVersion"]):
            raise Conflict(f'{kind} "{metadata["name"]}": the object has been modified', 409)
        return old

    def _update(self, old: Manifest, fresh: Manifest, strict: bool) -> Manifest:
        kind = old["kind"]
        fresh = self._admit(kind, fresh, old, strict)
        if fresh.get("spec") != old.get("spec"):
            fresh["metadata"] = {**fresh["metadata"], "generation": old["metadata"].get("generation", 1) + 1}
        if fresh == old:
            return old
        stored = self._store("MODIFIED", kind, fresh)
        if stored["metadata"].get("deletionTimestamp") and not stored["metadata"].get("finalizers"):
            self._remove(kind, stored)
        return stored

    def _admit(self, kind: str, body: Manifest, old: Manifest | None, strict: bool) -> Manifest:
        for hook in self.admission:
            body = hook(kind, body, old) or body
        if (old is None or body["metadata"] != old["metadata"]) and (wrong := object_meta.errors(body["metadata"])):
            raise Refused(f'{kind} "{body["metadata"].get("name", "")}" is invalid: ' + "; ".join(wrong), 422)
        return self._validated(kind, body, old, strict)

    def _validated(self, kind: str, body: Manifest, old: Manifest | None, strict: bool) -> Manifest:
        schema = self.schemas.get(kind)
        if schema is None:
            return body
        if strict and (unknown := crd_schema.unknown_fields(body, schema)):
            raise Refused("strict decoding error: " + ", ".join(f'unknown field "{path}"' for path in unknown), 400)
        prepared = {**crd_schema.prepare(body, schema), "metadata": body["metadata"]}
        errors = crd_schema.schema_errors(prepared, schema) + crd_schema.duplicates(prepared, schema)
        errors = errors or crd_schema.cel_errors(prepared, old, schema)
        if errors:
            raise Refused(f'{kind} "{body["metadata"]["name"]}" is invalid: ' + "; ".join(errors), 422)
        return prepared

    def _store(self, change: str, kind: str, body: Manifest) -> Manifest:
        self.version += 1
        body = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        name = body["metadata"]["name"]
        if change == "DELETED":
            self.objects[kind].pop(name, None)
        else:
            self.objects.setdefault(kind, {})[name] = body
        entry = Change(self.version, change, body)
        log = self.changes.setdefault(kind, [])
        log.append(entry)
        if len(log) > self.history:
            dropped = log[: self.history // 2]
            del log[: self.history // 2]
            self.compacted[kind] = dropped[-1].version
        for listener in self.listeners:
            listener(kind, entry)
        return body

    def _dependents(self, body: Manifest) -> list[tuple[str, str]]:
        return sorted(self.by_owner.get(body["metadata"]["uid"], ()))

    def _exists(self, reference: Manifest) -> bool:
        found = self.objects.get(reference["kind"], {}).get(reference["name"])
        return found is not None and found["metadata"]["uid"] == reference["uid"]

    def _remove(self, kind: str, body: Manifest) -> None:
        """The object is gone: collect what it owned, and let owners go that waited for it."""
        name = body["metadata"]["name"]
        if name not in self.objects.get(kind, {}):
            return
        self._store("DELETED", kind, body)
        for dependent_kind, dependent in self._dependents(body):
            self.delete(dependent_kind, dependent)
        self.by_owner.pop(body["metadata"]["uid"], None)
        for reference in body["metadata"].get("ownerReferences", ()):
            siblings = self.by_owner.get(reference["uid"], set())
            siblings.discard((kind, name))
            owner = self.objects.get(reference["kind"], {}).get(reference["name"])
            if owner and not siblings and FOREGROUND in owner["metadata"].get("finalizers", ()):
                self.drop_finalizer(owner, FOREGROUND)

    def modify(self, kind: str, body: Manifest) -> Manifest:
        """What a controller writes of an object, its status included."""
        return self._store("MODIFIED", kind, body)

    def drop_finalizer(self, body: Manifest, finalizer: str) -> None:
        left = [item for item in body["metadata"]["finalizers"] if item != finalizer]
        if left:
            self._store("MODIFIED", body["kind"], {**body, "metadata": {**body["metadata"], "finalizers": left}})
        else:
            self._remove(body["kind"], body)


ACCEPTED: dict[int, Manifest] = {}  # by identity, each kept alive here: a CRD is checked once, and its validators are made once


def install_crd(store: Store, crd: Manifest) -> None:
    """Register a CRD; Refused where the API server would refuse it. Who changes a CRD afterwards changes a copy."""
    if id(crd) not in ACCEPTED:
        if errors := crd_rules.errors(crd):
            raise Refused(f'CustomResourceDefinition "{crd["metadata"].get("name")}" is invalid: ' + "; ".join(errors[:10]), 422)
        ACCEPTED[id(crd)] = crd
    store.schemas[crd["spec"]["names"]["kind"]] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def matches(selector: str, body: Manifest) -> bool:
    """Label selectors: `a=b`, `a==b`, `a!=b`, `a`, `!a`, joined by commas."""
    labels = body["metadata"].get("labels") or {}
    for term in filter(None, (part.strip() for part in selector.split(","))):
        if "!=" in term:
            key, value = term.split("!=")
            if labels.get(key) == value:
                return False
        elif "=" in term:
            key, value = term.replace("==", "=").split("=")
            if labels.get(key) != value:
                return False
        elif term.startswith("!"):
            if term[1:] in labels:
                return False
        elif term not in labels:
            return False
    return True


def merge_patch(old: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return change
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def _editable(metadata: Manifest) -> Manifest:
    fixed = ("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")
    return {key: value for key, value in metadata.items() if key not in fixed}


def select(bodies: Iterable[Manifest], selector: str) -> list[Manifest]:
    return [body for body in bodies if matches(selector, body)]
