"""Carries plans out: cache -> reconcile -> status -> effects. One name at a time per worker, any number of names.

The order makes kill -9 harmless: the status is written first, with the resourceVersion it was read at; only then are objects
created (a taken name is adopted) or deleted (by uid). A write that is refused as stale changes nothing, here or in the cluster.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from terrace.cluster import manifests
from terrace.cluster.api import AlreadyExists, ApiError, Conflict, KindAbsent, Refused
from terrace_operator.cache import CHILD_KINDS, Cache
from terrace_operator.metrics import NoMetrics
from terrace_operator.reconcile import Create, Delete, Direct, Effect, reconcile
from terrace_operator.status import Event, rfc3339

Manifest = dict[str, Any]
logger = logging.getLogger("terrace.operator")
RETRY_SECONDS = 5.0
MAX_CONFLICTS = 4
DOUBTFUL = ("AttemptFailed", "AttemptStopped", "AttemptInterrupted", "Stopping")  # ends of attempts that could rest on an old view


class ApiCalls(Protocol):
    """What the controller needs of the API; `terrace.cluster.api.Api` and the simulator's store both have it."""

    namespace: str

    def get(self, kind: str, name: str) -> Manifest | None: ...
    def list(self, kind: str, selector: str = "") -> list[Manifest]: ...
    def knows(self, kind: str) -> bool: ...
    def create(self, body: Manifest) -> Manifest: ...
    def replace_status(self, body: Manifest) -> Manifest: ...
    def patch(self, kind: str, name: str, change: Manifest) -> Manifest: ...
    def delete(self, kind: str, name: str, uid: str | None = None, foreground: bool = False) -> None: ...


@dataclass
class Controller:
    api: ApiCalls
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    metrics: Any = field(default_factory=NoMetrics)
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = Cache(self.monotonic)

    def resync(self) -> list[str]:
        """Read everything anew: at the start, and from time to time because a watch can lose events.

        Returns the names that need a look: a curriculum that has ended and holds nothing costs no more than its line in the list.
        """
        for kind in ("Curriculum", *CHILD_KINDS):
            selector = "app.kubernetes.io/managed-by=terrace-operator" if kind in ("RayJob", "ConfigMap") else ""
            try:
                self.cache.replace_all(kind, self.api.list(kind, selector))
                self.cache.absent.discard(kind)
            except KindAbsent:
                self._lack(kind)
        return [name for name in self.cache.names() if not self._at_rest(name)]

    def look_for_absent(self) -> list[str]:
        """Kinds that were absent and are there now: their watches and a new list are the caller's affair."""
        return [kind for kind in sorted(self.cache.absent) if self.api.knows(kind)]

    def _lack(self, kind: str) -> None:
        if kind not in self.cache.absent:
            self.cache.absent.add(kind)
            logger.warning("the cluster does not know the kind %s: its CustomResourceDefinition is not installed", kind)

    def _at_rest(self, name: str) -> bool:
        curriculum = self.cache.curriculum(name) or {}
        status = curriculum.get("status") or {}
        seen = status.get("observedGeneration") == curriculum.get("metadata", {}).get("generation")
        return status.get("phase") in ("Succeeded", "Failed") and seen and not self.cache.holds_anything(name)

    def handle(self, name: str) -> float | None:
        """Reconcile one Curriculum; seconds until it wants to be looked at again, None if it is gone or at rest for good."""
        for _ in range(MAX_CONFLICTS):
            curriculum = self.cache.curriculum(name)
            if curriculum is None:
                return None
            if curriculum["metadata"].get("deletionTimestamp"):
                return None  # the garbage collector removes what it owns
            try:
                return self._once(name, curriculum)
            except KindAbsent as error:  # gone since the last list: nothing may be concluded from what is not seen
                if error.kind == "Curriculum":
                    return None
                self._lack(error.kind)
            except Conflict:
                self.metrics.conflict()
                fresh = self.api.get("Curriculum", name)
                if fresh is None:
                    self.cache.store("Curriculum", curriculum, deleted=True)
                    return None
                self.cache.store("Curriculum", fresh)
        return RETRY_SECONDS

    def _once(self, name: str, curriculum: Manifest) -> float | None:
        self._confirm_absent(name, curriculum)
        old_status = curriculum.get("status") or {}
        plan = reconcile(curriculum, self.cache.world(name), self.clock())
        if any(event.reason in DOUBTFUL for event in plan.events):
            # A watch may have missed the very event that says otherwise: a failure is only written after a look at the thing itself.
            self._refresh(name, curriculum)
            plan = reconcile(curriculum, self.cache.world(name), self.clock())
        creates = any(isinstance(effect, Create) for effect in plan.effects)
        if plan.status != old_status or creates:
            written = self.api.replace_status({**curriculum, "status": plan.status})
            self.cache.store("Curriculum", written)
            curriculum = written
        elif plan.effects:
            self._confirm_current(name, curriculum)
        self.metrics.planned(plan)
        for event in plan.events:
            logger.info(event.message, extra={"curriculum": name, "reason": event.reason})
            self._post(curriculum, event)
        for effect in plan.effects:
            if not self._carry_out(name, effect):
                return 1.0
        if creates:
            return 1.0
        return None if self._at_rest(name) else plan.requeue_seconds

    def _confirm_current(self, name: str, curriculum: Manifest) -> None:
        """Conflict if the view is old. A status that stays as it is is not written, so nothing else would tell: an attempt that a late
        watch event has not heard of would be taken for a stranger's, and deleted."""
        fresh = self.api.get("Curriculum", name)
        if fresh is None or fresh["metadata"].get("resourceVersion") != curriculum["metadata"].get("resourceVersion"):
            raise Conflict(f"Curriculum {name} changed since it was read", 409)

    def _confirm_absent(self, name: str, curriculum: Manifest) -> None:
        """A RayJob that the cache does not know may only be late: ask before its attempt is called lost."""
        for job in () if "RayJob" in self.cache.absent else jobs_in_flight(curriculum):
            if not self.cache.has_rayjob(name, job) and (found := self.api.get("RayJob", job)) is not None:
                self.cache.store("RayJob", found)

    def _refresh(self, name: str, curriculum: Manifest) -> None:
        """Read the attempts in flight and their progress from the API server."""
        for job in jobs_in_flight(curriculum):
            if (found := self.api.get("RayJob", job)) is not None:
                self.cache.store("RayJob", found)
            else:
                self.cache.forget_rayjob(name, job)
        if (progress := self.api.get("ConfigMap", manifests.progress_name(name))) is not None:
            self.cache.store("ConfigMap", progress)

    def _carry_out(self, name: str, effect: Effect) -> bool:
        """False when what was planned no longer fits and must be decided again."""
        match effect:
            case Create(body):
                return self._create(name, body)
            case Delete(job, uid):
                self.api.delete("RayJob", job, uid=uid, foreground=True)
                fresh = self.api.get("RayJob", job)
                if fresh is None:
                    self.cache.forget_rayjob(name, job)
                else:
                    self.cache.store("RayJob", fresh)
                return fresh is None or bool(fresh["metadata"].get("deletionTimestamp"))
            case Direct(config_map, key, directive):
                self.api.patch("ConfigMap", config_map, {"data": {key: json.dumps(directive, sort_keys=True)}})
                return True
        return True

    def _create(self, name: str, body: Manifest) -> bool:
        kind, object_name = body["kind"], body["metadata"]["name"]
        if kind == "RayJob" and not self._alone(name, object_name):
            return False
        try:
            made = self.api.create(body)
            logger.info("created %s %s", kind, object_name, extra={"curriculum": name})
        except AlreadyExists:
            found = self.api.get(kind, object_name)
            if found is None:
                return False
            made = found
            if not _owned_by(found, body):
                return self._refused(name, body, "its name is taken by something else: delete that")
        except Refused as error:
            return self._refused(name, body, str(error))
        if kind in CHILD_KINDS:
            self.cache.store(kind, made)
        else:
            self.cache.made(name, kind, object_name)
        return True

    def _refused(self, name: str, body: Manifest, why: str) -> bool:
        """Whatever is refused, it is the attempt that cannot start; the next reconcile counts it as a failure."""
        kind, object_name = body["kind"], body["metadata"]["name"]
        logger.warning("refused: %s %s: %s", kind, object_name, why, extra={"curriculum": name})
        jobs = jobs_in_flight(self.cache.curriculum(name) or {"metadata": {"name": name}})
        not_made = [job for job in jobs if job == object_name or not self.cache.has_rayjob(name, job)]
        self.cache.refuse(name, [*not_made, object_name][0], f"{kind} {object_name} was refused: {why}")
        return False

    def _alone(self, name: str, object_name: str) -> bool:
        """The last look before an attempt is created: no RayJob that this process has not seen."""
        selector = f"{manifests.LABEL_CURRICULUM}={name}"
        unseen = False
        for job in self.api.list("RayJob", selector):
            job_name = job["metadata"]["name"]
            unseen = unseen or (job_name != object_name and not self.cache.has_rayjob(name, job_name))
            self.cache.store("RayJob", job)
        return not unseen

    def _post(self, curriculum: Manifest, event: Event) -> None:
        """Events inform people; one that cannot be written is logged and forgotten."""
        metadata = curriculum["metadata"]
        text = f"{event.reason} {event.message} {metadata.get('resourceVersion')}"
        now = rfc3339(self.clock())
        body = {
            "apiVersion": "v1", "kind": "Event", "type": "Warning" if event.warning else "Normal",
            "metadata": {"name": f"{metadata['name']}.{hashlib.sha256(text.encode()).hexdigest()[:16]}",
                         "namespace": metadata["namespace"]},
            "involvedObject": {"apiVersion": curriculum["apiVersion"], "kind": curriculum["kind"], "name": metadata["name"],
                               "namespace": metadata["namespace"], "uid": metadata["uid"]},
            "reason": event.reason, "message": event.message or event.reason, "count": 1,
            "firstTimestamp": now, "lastTimestamp": now,
            "source": {"component": "terrace-operator"}, "reportingComponent": "terrace-operator",
        }  # fmt: skip
        try:
            self.api.create(body)
        except AlreadyExists:
            return
        except ApiError as error:
            logger.warning("event not written: %s", error, extra={"curriculum": metadata["name"]})


def _owned_by(found: Manifest, body: Manifest) -> bool:
    wanted = body["metadata"]["ownerReferences"][0]["uid"]
    return any(reference.get("uid") == wanted for reference in found["metadata"].get("ownerReferences", ()))


def jobs_in_flight(curriculum: Manifest) -> list[str]:
    """RayJobs of the attempts whose end is not in the status yet."""
    stored = ((curriculum.get("status") or {}).get("controller") or {}).get("machine") or {}
    name = curriculum["metadata"]["name"]
    return [manifests.rayjob_name(name, stage.get("index", 0), stage["attempt"]) for stage in stored.get("stages", ())
            if not stage.get("ended", True)]  # fmt: skip
