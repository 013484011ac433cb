"""Gauges of every curriculum, read from what the operator has cached when somebody scrapes: no call, nothing kept. Pure.

Only of curricula that have not ended: an ended one would stay on every dashboard for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

Manifest = dict[str, Any]
Sample = tuple[str, dict[str, str], float]
HELP = {
    "terrace_curriculum_phase": "1 for the phase that the curriculum is in.",
    "terrace_curriculum_degraded": "1 while the condition Degraded holds, by its reason.",
    "terrace_curriculum_queued_seconds": "How long the attempt has been waiting for quota.",
    "terrace_curriculum_report_age_seconds": "Since a running attempt last reported something new.",
    "terrace_curriculum_checkpoint_age_seconds": "Since the newest checkpoint of a running stage, or since its attempt began.",
    "terrace_curriculum_step": "Optimizer step of the current stage.",
    "terrace_curriculum_total_steps": "Optimizer steps of the current stage.",
    "terrace_curriculum_gpus": "GPUs held now.",
    "terrace_curriculum_restarts": "Restarts of the current stage, by whose failure.",
    "terrace_curriculum_restarts_left": "Restarts that the current stage has left, by whose failure.",
    "terrace_curriculum_limit_used_ratio": "Share of a limit of spec.limits that is used.",
}


def samples(curricula: list[Manifest], now: float) -> Iterator[Sample]:
    for body in curricula:
        status = body.get("status") or {}
        if status.get("phase") in (None, "Succeeded", "Failed"):
            continue
        labels = {"curriculum": body["metadata"]["name"]}
        yield "terrace_curriculum_phase", labels | {"phase": status["phase"]}, 1.0
        yield "terrace_curriculum_gpus", labels, float(status.get("allocatedGpus", 0))
        degraded = next((c for c in status.get("conditions") or () if c["type"] == "Degraded"), {})
        if degraded.get("status") == "True":
            yield "terrace_curriculum_degraded", labels | {"reason": degraded["reason"]}, 1.0
        current = (status.get("currentStage") or "").split(",")
        for stage in (s for s in status.get("stages") or () if s["name"] in current):
            of_stage = labels | {"stage": stage["name"]}
            yield from ((name, of_stage | more, value) for name, more, value in _stage(body, stage, now))
        for name, share in _limits(body["spec"].get("limits") or {}, status.get("usage") or {}):
            yield "terrace_curriculum_limit_used_ratio", labels | {"limit": name}, share


def _stage(body: Manifest, stage: Manifest, now: float) -> Iterator[Sample]:
    yield "terrace_curriculum_step", {}, float(stage.get("step", 0))
    yield "terrace_curriculum_total_steps", {}, float(stage.get("totalSteps", 0))
    begun = stage.get("admittedTime") or stage.get("attemptTime")
    if stage["phase"] == "Queued" and stage.get("attemptTime"):
        yield "terrace_curriculum_queued_seconds", {}, _age(stage["attemptTime"], now)
    if stage["phase"] == "Running" and begun:
        yield "terrace_curriculum_report_age_seconds", {}, _age(max(stage.get("lastReportTime") or begun, begun), now)
        saved = (stage.get("checkpoint") or {}).get("time") or begun
        yield "terrace_curriculum_checkpoint_age_seconds", {}, _age(max(saved, begun), now)
    policy, names = body["spec"].get("failurePolicy") or {}, body["spec"]["recipe"]["stages"]
    failure = next((item.get("failure") or {} for item in names if item["name"] == stage["name"]), {})
    kinds = (("program", "restarts", "maxRestarts", "max_restarts"),
             ("infrastructure", "infraRestarts", "maxInfraRestarts", "max_infrastructure_restarts"))  # fmt: skip
    for kind, counted, of_policy, of_stage in kinds:
        yield "terrace_curriculum_restarts", {"kind": kind}, float(stage.get(counted, 0))
        allowed = policy.get(of_policy, failure.get(of_stage))
        if allowed is not None:
            yield "terrace_curriculum_restarts_left", {"kind": kind}, float(max(allowed - stage.get(counted, 0), 0))


def _limits(limits: Manifest, usage: Manifest) -> Iterator[tuple[str, float]]:
    for name in ("gpuHours", "wallHours", "cost"):
        if limits.get(name) and usage.get(name):
            yield name, float(usage[name]) / limits[name]


def _age(text: str, now: float) -> float:
    return max(now - datetime.fromisoformat(text).timestamp(), 0.0)
