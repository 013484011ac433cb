"""What the watches have shown, by Curriculum. Safe to use from several threads.

A cache may lag or miss an event; nothing unsafe follows from it, because the status is only written with the resourceVersion it
was read at, the absence of a RayJob is confirmed by asking, and a full resync replaces everything every few minutes.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from terrace.cluster.manifests import LABEL_CURRICULUM, LABEL_STAGE, progress_name
from terrace_operator.observe import ENDED, World, status_of

Manifest = dict[str, Any]
MADE_SECONDS = 600.0  # objects that are not watched are made again, or found again, at the first attempt after this
CHILD_KINDS = ("RayJob", "ConfigMap", "Workload")


class Cache:
    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.RLock()
        self._curricula: dict[str, Manifest] = {}
        self._children: dict[str, dict[str, dict[str, Manifest]]] = {kind: {} for kind in CHILD_KINDS}
        self._since: dict[tuple[str, str], tuple[Any, float]] = {}
        self._refused: dict[str, dict[str, str]] = {}
        self._made: dict[str, dict[str, float]] = {}
        self.absent: set[str] = set()  # kinds that the cluster does not know

    def names(self) -> list[str]:
        with self._lock:
            return list(self._curricula)

    def curriculum(self, name: str) -> Manifest | None:
        with self._lock:
            return self._curricula.get(name)

    def knows(self, body: Manifest) -> bool:
        """Whether this very version of a Curriculum is the one that is kept."""
        known = self.curriculum(body["metadata"]["name"])
        return known is not None and known["metadata"].get("resourceVersion") == body["metadata"].get("resourceVersion")

    def store(self, kind: str, body: Manifest, deleted: bool = False) -> str | None:
        """Take one object in; returns the Curriculum it concerns, None if none."""
        metadata = body["metadata"]
        with self._lock:
            if kind == "Curriculum":
                if deleted:
                    self._forget(metadata["name"])
                else:
                    self._curricula[metadata["name"]] = body
                return metadata["name"]
            owner, key = self._owner(kind, metadata)
            if owner is None:
                return None
            children = self._children[kind].setdefault(owner, {})
            if deleted:
                known = children.get(key)
                if known is None or known["metadata"].get("uid") == metadata.get("uid"):
                    children.pop(key, None)
            else:
                children[key] = body
            return owner

    def _owner(self, kind: str, metadata: Manifest) -> tuple[str | None, str]:
        if kind == "Workload":  # named by Kueue; found by the RayJob that owns it
            for reference in metadata.get("ownerReferences", ()):
                if reference.get("kind") == "RayJob":
                    return reference["name"].rsplit("-s", 1)[0], reference["name"]
            return None, ""
        return metadata.get("labels", {}).get(LABEL_CURRICULUM), metadata["name"]

    def _forget(self, name: str) -> None:
        self._curricula.pop(name, None)
        self._refused.pop(name, None)
        self._made.pop(name, None)
        for owners in self._children.values():
            owners.pop(name, None)
        for key in [key for key in self._since if key[0] == name]:
            del self._since[key]

    def replace_all(self, kind: str, bodies: Iterable[Manifest]) -> None:
        """A full list of one kind replaces what was known."""
        bodies = list(bodies)
        with self._lock:
            if kind == "Curriculum":
                present = {body["metadata"]["name"] for body in bodies}
                for name in set(self._curricula) - present:
                    self._forget(name)
            else:
                self._children[kind] = {}
            for body in bodies:
                self.store(kind, body)

    def refuse(self, curriculum: str, name: str, why: str) -> None:
        with self._lock:
            self._refused[curriculum] = dict([*self._refused.get(curriculum, {}).items(), (name, why)][-8:])

    def made(self, curriculum: str, kind: str, name: str) -> None:
        """An object that is not watched was created or found."""
        with self._lock:
            self._made.setdefault(curriculum, {})[f"{kind}/{name}"] = self._monotonic()

    def forget_rayjob(self, curriculum: str, name: str) -> None:
        with self._lock:
            self._children["RayJob"].get(curriculum, {}).pop(name, None)

    def has_rayjob(self, curriculum: str, name: str) -> bool:
        with self._lock:
            return name in self._children["RayJob"].get(curriculum, {})

    def holds_anything(self, curriculum: str) -> bool:
        """Whether a RayJob of it still runs, or is still being deleted."""
        with self._lock:
            jobs = self._children["RayJob"].get(curriculum, {}).values()
            return any(job["metadata"].get("deletionTimestamp") or status_of(job).get("jobDeploymentStatus") not in ENDED for job in jobs)

    def world(self, name: str) -> World:
        """Everything known of one Curriculum, with how long this process has seen it so."""
        with self._lock:
            now = self._monotonic()
            made = {key for key, since in self._made.get(name, {}).items() if now - since < MADE_SECONDS}
            jobs = dict(self._children["RayJob"].get(name, {}))
            maps = self._children["ConfigMap"].get(name, {})
            progress = (maps.get(progress_name(name)) or {}).get("data") or {}
            reports = tuple(filter(None, (parse(text) for key, text in progress.items() if key.endswith("progress.json"))))
            told = {key.removesuffix("directive.json"): parse(text) for key, text in progress.items() if key.endswith("directive.json")}
            deleting = {job: self._seconds(name, f"deleting {job}", body["metadata"].get("deletionTimestamp")) for job, body
                        in jobs.items() if body["metadata"].get("deletionTimestamp")}  # fmt: skip
            ended = {job: self._seconds(name, f"ended {job}", True) for job, body in jobs.items()
                     if status_of(body).get("jobDeploymentStatus") in ENDED}  # fmt: skip
            return World(
                rayjobs=jobs, reports=reports, directives={prefix: value for prefix, value in told.items() if value},
                quiet_seconds=self._quiet(name, jobs, progress),
                deleting_seconds=deleting, ended_seconds=ended,
                workloads=dict(self._children["Workload"].get(name, {})),
                recipes={key: body["data"]["recipe.yaml"] for key, body in maps.items() if "recipe.yaml" in (body.get("data") or {})},
                refused=dict(self._refused.get(name, {})),
                objects=frozenset(made | {f"ConfigMap/{key}" for key in maps}), absent=frozenset(self.absent),
            )  # fmt: skip

    def _quiet(self, name: str, jobs: dict[str, Manifest], progress: Manifest) -> dict[int, float]:
        """Seconds of silence per stage that has a RayJob."""
        running: dict[int, list[tuple[str, bool, str]]] = {}
        for job, body in sorted(jobs.items()):
            index = int(body["metadata"].get("labels", {}).get(LABEL_STAGE, -1))
            running.setdefault(index, []).append((job, bool(body["spec"].get("suspend")), status_of(body).get("jobStatus", "")))
        return {
            index: self._seconds(name, f"quiet {index}", (progress.get(f"s{index}.progress.json", progress.get("progress.json")), seen))
            for index, seen in running.items()
        }

    def _seconds(self, name: str, what: str, value: Any) -> float:
        """Seconds, by the clock that only runs forward, since this was first seen with this value."""
        now = self._monotonic()
        known = self._since.get((name, what))
        if known is None or known[0] != value:
            self._since[name, what] = (value, now)
            return 0.0
        return now - known[1]


def parse(text: str | None) -> Manifest | None:
    """A JSON object that a program wrote; what cannot be read counts as not written."""
    try:
        value = json.loads(text) if text else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
