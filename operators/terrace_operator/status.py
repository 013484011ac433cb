"""The status people read, derived from the state machine's state and from what is seen. Pure.

Phase and conditions answer two questions at a glance: where does it stand, and what does it wait for. Every reason that can appear
here has an entry in docs/kubernetes.md (a test compares the two).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from terrace.cluster import manifests
from terrace.curriculum.actions import Wait
from terrace.curriculum.state import RunState, StageState
from terrace_operator import absent, observe
from terrace_operator.codec import Memory
from terrace_operator.conditions import Finding, merge, quota_message
from terrace_operator.observe import World
from terrace_operator.recipes import Accepted

Manifest = dict[str, Any]
PHASES = {"new": "Pending", "paused": "Paused", "suspended": "Suspended", "succeeded": "Succeeded", "failed": "Failed",
          "cancelled": "Failed"}  # fmt: skip
MAX_METRICS, MAX_TEXT = 32, 1000

# What of the state machine's journal is worth an event on the resource: reason, and whether it is a warning.
@dataclass(frozen=True)
class Event:
    reason: str
    message: str
    warning: bool = False


EVENTS: dict[str, tuple[str, bool]] = {
    "run_started": ("Started", False), "stage_attempt_started": ("StageStarted", False),
    "stage_attempt_launched": ("AttemptCreated", False), "stage_attempt_failed": ("AttemptFailed", True),
    "stage_attempt_preempted": ("AttemptStopped", False), "stage_attempt_interrupted": ("AttemptInterrupted", True),
    "stage_completed": ("StageCompleted", False), "gate_passed": ("GatePassed", False), "gate_missed": ("GateMissed", True),
    "paused": ("Paused", False), "suspended": ("Suspended", False), "cancelled": ("Cancelled", False),
    "run_completed": ("Succeeded", False), "run_failed": ("Failed", True), "stop_requested": ("Stopping", False),
    "stage_cleared": ("StageRerun", False),
}  # fmt: skip


@functools.lru_cache(maxsize=4096)
def rfc3339(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def event_of(event: Manifest) -> tuple[str, str, bool] | None:
    """Kubernetes event of a journal event: reason, message, warning; None if it is of no interest."""
    if event["event"] not in EVENTS:
        return None
    reason, warning = EVENTS[event["event"]]
    where = f"stage {event['stage']}" if event.get("stage") else ""
    attempt = f", attempt {event['attempt']}" if event.get("attempt") else ""
    why = ": ".join(part for part in (event.get("reason", ""), event.get("message", "")) if part)
    return reason, ": ".join(part for part in (where + attempt, why) if part)[:MAX_TEXT], warning


# Reasons of conditions that are news to whoever looks at the events: told once, when they come.
NEWS = ("KubeRayAbsent", "KueueAbsent", "KubeRaySilent", "Inadmissible", "EvictedDeactivated", "NoWorkload")
SILENT_SECONDS = 60.0  # without a word of KubeRay on a RayJob


def news(old: Manifest, new: Manifest) -> list[Event]:
    """Events for reasons that have newly come up in Progressing or Degraded."""
    before = {condition["reason"] for condition in old.get("conditions") or []}
    found = [condition for condition in new["conditions"] if condition["type"] in ("Progressing", "Degraded")]
    fresh = {condition["reason"]: condition["message"] for condition in found if condition["reason"] in NEWS}
    return [Event(reason, message[:MAX_TEXT], True) for reason, message in fresh.items() if reason not in before]


def refused(curriculum: Manifest, old: Manifest, reason: str, problem: str, now: float) -> Manifest:
    """Status of a Curriculum without a spec that could be in force: all that is known stays, and nothing is started."""
    generation = curriculum["metadata"].get("generation", 0)
    findings = [
        Finding("Accepted", "False", reason, problem),
        Finding("Progressing", "False", reason, "nothing is started until the spec is corrected"),
    ]
    others = [condition for condition in old.get("conditions") or [] if condition["type"] not in ("Accepted", "Progressing")]
    conditions = merge(old.get("conditions") or [], findings, generation, rfc3339(now) or "") + others
    return {**old, "observedGeneration": generation, "phase": old.get("phase", "Pending"), "conditions": conditions}


def derive(
    curriculum: Manifest, old: Manifest, accepted: Accepted, state: RunState, memory: Memory, world: World,
    waiting: Wait | None, now: float,
) -> Manifest:  # fmt: skip
    """The whole status but `controller`."""
    spec = accepted.spec
    assert spec is not None
    name, generation = curriculum["metadata"]["name"], curriculum["metadata"].get("generation", 0)
    old_stages = {stage["name"]: stage for stage in old.get("stages") or []}
    stages = [_stage(name, stage, old_stages.get(stage.name, {}), memory, world, now) for stage in state.stages]
    side_by_side = _side_by_side(name, state, world)
    current = side_by_side[0] if side_by_side else state.current
    shown = stages[current.index] if current else stages[-1]
    job = _job(name, current, world)
    holding = [stage for stage in side_by_side if _holds(_job(name, stage, world))]
    status: Manifest = {
        "observedGeneration": generation,
        "phase": _phase(state, current, shown),
        "currentStage": ",".join(stage.name for stage in side_by_side)[:255] or (current.name if current else None),
        "stagesDone": f"{sum(stage.phase == 'completed' for stage in state.stages)}/{len(state.stages)}",
        "progress": f"{shown.get('step', 0)}/{shown['totalSteps']}" if shown.get("totalSteps") else "",
        "restarts": sum(stage["restarts"] + stage["infraRestarts"] for stage in stages),
        "allocatedGpus": sum(manifests.allocated_gpus(spec.recipe.stages[stage.index], spec.runtime) for stage in holding),
        "queue": spec.queue.name if spec.queue else None,
        "startTime": rfc3339(state.started_at),
        "completionTime": rfc3339(state.ended_at),
        "lastCheckpoint": _newest_checkpoint(stages) or old.get("lastCheckpoint"),
        "mlflow": next((report["mlflow"] for report in world.reports if report.get("mlflow")), None) or old.get("mlflow"),
        "stages": stages,
    }
    findings = _findings(name, accepted, state, current, shown, job, world, waiting)
    status["conditions"] = merge(old.get("conditions") or [], findings, generation, rfc3339(now) or "")
    return {key: value for key, value in status.items() if value is not None}


def show_limits(status: Manifest, usage: Manifest | None, reached: str | None, state: RunState) -> None:
    """What was used, and that a limit holds it: in place of a suspension that nobody asked for."""
    if usage is not None:
        status["usage"] = usage
    if reached and state.phase in ("running", "suspended"):
        for condition in status["conditions"]:
            if condition["type"] == "Progressing" and condition["reason"] in ("Suspended", "Stopping"):
                condition["reason"], condition["message"] = "LimitReached", reached[:MAX_TEXT]


def _job(name: str, stage: StageState | None, world: World) -> Manifest | None:
    if stage is None or stage.ended:
        return None
    return world.rayjobs.get(manifests.rayjob_name(name, stage.index, stage.attempt))


def _side_by_side(name: str, state: RunState, world: World) -> list[StageState]:
    """Stages with an attempt in flight, those that have their quota first: the first one speaks for the Curriculum."""
    return sorted(state.attempts_in_flight, key=lambda stage: not _holds(_job(name, stage, world)))


def _holds(job: Manifest | None) -> bool:
    """Whether it has its quota, and pods."""
    return job is not None and not observe.is_queued(job) and observe.status_of(job).get("jobDeploymentStatus") not in observe.ENDED


def _phase(state: RunState, current: StageState | None, shown: Manifest) -> str:
    if state.phase != "running":
        return PHASES[state.phase]
    if current is None or current.attempt == 0:
        return "Pending"
    if shown["phase"] == "Queued":
        return "Queued"
    return "Restarting" if current.phase == "waiting" else "Running"


def _stage_phase(state: StageState, job: Manifest | None, report: Manifest | None) -> str:
    if state.phase == "completed":
        return "Succeeded"
    if state.phase == "pending":
        return "Pending"
    if state.phase == "waiting":
        return "BackingOff" if state.reason not in ("Preempted", "StoppedWithoutCheckpoint") else "Stopped"
    if state.stop_deadline is not None:
        return "Stopping"
    if job is not None and observe.is_queued(job):
        return "Queued"
    running = report is not None or (job is not None and observe.status_of(job).get("jobStatus") == "RUNNING")
    return "Running" if running else "Starting"


def _stage(name: str, state: StageState, old: Manifest, memory: Memory, world: World, now: float) -> Manifest:
    """What people see of one stage. What the report said last stays when a newer attempt has not reported yet."""
    settled = {"completed": "Succeeded", "pending": "Pending"}.get(state.phase)
    if settled is not None and (old.get("phase"), old.get("attempt")) == (settled, state.attempt):
        return old
    job_name = manifests.rayjob_name(name, state.index, state.attempt) if state.attempt else None
    job = world.rayjobs.get(job_name) if job_name else None
    report = observe.report_of(world, state.name, state.attempt) or {}
    phase = _stage_phase(state, job if not state.ended else None, report or None)
    fresh = state.attempt == 0
    shown: Manifest = {
        "name": state.name,
        "phase": phase,
        "attempt": state.attempt,
        "restarts": state.program_failures,
        "infraRestarts": state.infrastructure_failures,
        "preemptions": state.preemptions + memory.queue_preemptions.get(state.name, 0),
        "rayJobName": job_name,
        "rayClusterName": observe.status_of(job).get("rayClusterName") or None if job else old.get("rayClusterName"),
        "specHash": memory.stage_hashes.get(state.name, "")[:16] or None,
        "recipeConfigMap": manifests.recipe_name(name, memory.recipe_maps[state.name]) if state.name in memory.recipe_maps else None,
        "startTime": rfc3339(state.started_at),
        "attemptTime": rfc3339(state.attempt_started_at),
        "admittedTime": rfc3339(memory.admitted_at.get(job_name or "")),
        "stopTime": rfc3339(state.stop_deadline),
        "completionTime": rfc3339(state.completed_at),
        "nextRetryTime": rfc3339(state.retry_at) if state.phase == "waiting" else None,
        "step": int(report.get("step", 0 if fresh else old.get("step", 0))),
        "totalSteps": int(report.get("total_steps", 0 if fresh else old.get("totalSteps", 0))),
        "lastReportTime": _report_time(report, old, world, now),
        "checkpoint": _checkpoint(state.name, report, old.get("checkpoint") or {}, now) or (None if fresh else old.get("checkpoint")),
        "mlflowRunId": (report.get("mlflow") or {}).get("runId") or (None if fresh else old.get("mlflowRunId")),
        "metrics": _metrics(report) or ({} if fresh else old.get("metrics", {})),
        "reason": state.reason or None,
        "message": state.message[:MAX_TEXT] or None,
    }
    return {key: value for key, value in shown.items() if value is not None}


def _report_time(report: Manifest, old: Manifest, world: World, now: float) -> str | None:
    if not report:
        return old.get("lastReportTime")
    # Only when something new was reported, else every reconcile would be a write.
    same = report.get("step", 0) == old.get("step", -1) and old.get("lastReportTime")
    return old["lastReportTime"] if same else rfc3339(now)


def _checkpoint(stage: str, report: Manifest, old: Manifest, now: float) -> Manifest | None:
    """The newest checkpoint, with when it was complete: by the report, else when it was first seen here."""
    found = report.get("checkpoint")
    if not found:
        return None
    values = {"uri": str(found.get("uri", ""))[:MAX_TEXT], "stage": stage, "step": int(found.get("step", 0))}
    known = old.get("time") if (old.get("uri"), old.get("step")) == (values["uri"], values["step"]) else None
    return values | {"time": str(found.get("time") or known or rfc3339(now))[:32]}


def _newest_checkpoint(stages: list[Manifest]) -> Manifest | None:
    return next((stage["checkpoint"] for stage in reversed(stages) if stage.get("checkpoint")), None)


def _metrics(report: Manifest) -> dict[str, str]:
    values = report.get("metrics") or {}
    return {str(key)[:63]: str(values[key])[:64] for key in sorted(values)[:MAX_METRICS]}


def _findings(
    name: str, accepted: Accepted, state: RunState, current: StageState | None, shown: Manifest, job: Manifest | None,
    world: World, waiting: Wait | None,
) -> list[Finding]:  # fmt: skip
    assert accepted.spec is not None
    waits = state.phase == "running" and (current is None or current.phase != "completed")
    lacking = absent.lacking(accepted.spec, world.absent) if waits else []
    problem = accepted.problem or "the spec is in force"
    findings = [Finding("Accepted", "True" if accepted.reason == "Valid" else "False",
                        accepted.reason, problem)]  # fmt: skip
    quota = quota_message(job, world.workloads.get(job["metadata"]["name"]) if job else None)
    if lacking:
        why = (absent.reason(lacking), absent.message(lacking))
        findings += [quota, Finding("Progressing", "False", *why), Finding("Degraded", "True", *why)]
    else:
        findings += [quota, _progressing(state, current, shown, waiting, quota), _degraded(name, state, current, world)]
    # At a missed gate nothing runs and nothing is held either, and suspend must not answer the gate.
    at_rest = state.phase == "suspended" or (state.phase == "paused" and accepted.spec.suspend)
    for kind, holds in (("Suspended", at_rest), ("Succeeded", state.phase == "succeeded")):
        findings.append(Finding(kind, "True" if holds else "False", kind if holds else f"Not{kind}", state.message if holds else ""))
    failed = state.phase in ("failed", "cancelled")
    reason = ("Cancelled" if state.phase == "cancelled" else state.reason or "Failed") if failed else "NotFailed"
    findings.append(Finding("Failed", "True" if failed else "False", reason, state.message if failed else ""))
    return findings


def _progressing(state: RunState, current: StageState | None, shown: Manifest, waiting: Wait | None, quota: Finding) -> Finding:
    message = state.message
    fixed = {"succeeded": "Succeeded", "suspended": "Suspended", "cancelled": "Cancelled"}
    if state.phase in fixed:
        return Finding("Progressing", "False", fixed[state.phase], message)
    if state.phase == "failed":
        return Finding("Progressing", "False", "GateMissed" if state.reason == "GateMissed" else "StageFailed", message)
    if state.phase == "paused":
        return Finding("Progressing", "False", "GateMissed" if state.reason == "GateMissed" else "Paused", message)
    text = waiting.reason if waiting else (current.message if current else "")
    if state.request in ("suspend", "cancel"):
        return Finding("Progressing", "True", "Stopping", f"{state.request}: {text}")
    reasons = {"Queued": "WaitingForQuota", "Starting": "Starting", "Running": "Running", "Stopping": "Stopping",
               "BackingOff": "BackingOff", "Stopped": "Preempted", "Pending": "Pending"}  # fmt: skip
    reason = reasons.get(shown["phase"], "Pending")
    if reason == "WaitingForQuota" and quota.reason in ("Inadmissible", "EvictedDeactivated"):
        return Finding("Progressing", "False", quota.reason, quota.message)  # waiting alone does not help
    if reason == "WaitingForQuota":
        preempted = int(shown.get("preemptions", 0)) > 0
        return Finding("Progressing", "True", "Preempted" if preempted else reason, quota.message or "waiting for the queue")
    if reason == "BackingOff" and current is not None:
        text = f"{current.reason}: {current.message}; next attempt {shown.get('nextRetryTime', 'soon')}"
    return Finding("Progressing", "True", reason, text)


def _degraded(name: str, state: RunState, current: StageState | None, world: World) -> Finding:
    """What is not as it should be while it still goes on."""
    stuck = [job for job, seconds in world.deleting_seconds.items() if seconds > 120.0 and job in world.rayjobs]
    if stuck:
        text = f"pods of {stuck[0]} do not end; their node is probably dead: taint it with node.kubernetes.io/out-of-service"
        return Finding("Degraded", "True", "OldPodsTerminating", text)
    for stage in state.stages:
        if stage.phase == "waiting" and stage.reason in ("Stalled", "HeadLost", "AttemptLost"):
            return Finding("Degraded", "True", stage.reason, stage.message)
    job = _job(name, current, world)
    if current and job is not None and not observe.is_queued(job) and not observe.status_of(job) and world.quiet(current) > SILENT_SECONDS:
        text = f"KubeRay has not looked at RayJob {job['metadata']['name']}: is its operator running, and does it watch this namespace?"
        return Finding("Degraded", "True", "KubeRaySilent", text)
    if job is not None:
        for condition in (observe.status_of(job).get("rayClusterStatus") or {}).get("conditions") or []:
            if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
                return Finding("Degraded", "True", "ReplicaFailure", str(condition.get("message", ""))[:MAX_TEXT])
    return Finding("Degraded", "False", "AsExpected", "")
