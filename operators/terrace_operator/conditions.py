"""Conditions in the style of metav1.Condition: merged so that times change only when a status changes. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    type: str
    status: str
    reason: str
    message: str = ""


def merge(old: list[Manifest], findings: list[Finding], generation: int, now: str) -> list[Manifest]:
    """The new list of conditions; `lastTransitionTime` is kept where the status is the same."""
    before = {condition["type"]: condition for condition in old}
    merged = []
    for finding in findings:
        known = before.get(finding.type)
        same = known is not None and known["status"] == finding.status
        merged.append(
            {
                "type": finding.type, "status": finding.status, "reason": finding.reason, "message": finding.message[:2000],
                "observedGeneration": generation, "lastTransitionTime": known["lastTransitionTime"] if same and known else now,
            }
        )  # fmt: skip
    return merged


OTHERS = {"Volcano": "volcano.sh/queue-name", "YuniKorn": "yunikorn.apache.org/queue"}


def quota_message(job: Manifest | None, workload: Manifest | None) -> Finding:
    """Why Kueue does or does not admit: its own words, which otherwise only the Workload shows."""
    if job is None:
        return Finding("QuotaReserved", "Unknown", "NoAttempt", "no attempt is in the cluster")
    labels = job["metadata"].get("labels", {})
    for name, label in OTHERS.items():
        if label in labels:
            text = f"{name} places the pods when queue {labels[label]} has room: its own objects say what they wait for"
            return Finding("QuotaReserved", "Unknown", "OtherScheduler", text)
    if "kueue.x-k8s.io/queue-name" not in labels:
        return Finding("QuotaReserved", "True", "NoQueue", "no queue is set: pods are created at once")
    conditions = {c["type"]: c for c in ((workload or {}).get("status") or {}).get("conditions") or []}
    reserved, evicted = conditions.get("QuotaReserved"), conditions.get("Evicted")
    if reserved is not None and reserved.get("status") == "True":
        return Finding("QuotaReserved", "True", _word(reserved, "QuotaReserved"), reserved.get("message", ""))
    if not job["spec"].get("suspend"):
        return Finding("QuotaReserved", "True", "Admitted", "the queue has admitted the RayJob")
    if workload is not None and (workload.get("spec") or {}).get("active") is False:
        text = (evicted or {}).get("message") or "the Workload was deactivated"
        name = workload["metadata"]["name"]
        wakes = f"it comes back with: kubectl patch workload {name} --type merge -p '{{\"spec\":{{\"active\":true}}}}'"
        return Finding("QuotaReserved", "False", "EvictedDeactivated", f"{text}; {wakes}")
    if evicted is not None and evicted.get("status") == "True":
        text = "; ".join(c.get("message", "") for c in (evicted, reserved) if c and c.get("message"))
        return Finding("QuotaReserved", "False", _eviction(_word(evicted, "")), text)
    if reserved is not None:
        return Finding("QuotaReserved", "False", _word(reserved, "Pending"), reserved.get("message", ""))
    return Finding("QuotaReserved", "False", "NoWorkload", "Kueue has made no Workload yet: is it installed, is the queue right?")


def _eviction(reason: str) -> str:
    """`EvictedDeactivated` for every way in which Kueue switches a Workload off (DeactivatedDueToRequeuingLimitExceeded, ...)."""
    return "EvictedDeactivated" if reason.startswith("Deactivated") else f"Evicted{reason}"[:64]


def _word(condition: Manifest, other: str) -> str:
    """Kueue's reason, where it is one word in CamelCase, as conditions have it."""
    found = str(condition.get("reason") or "")
    return found[:56] if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", found) else other
