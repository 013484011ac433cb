"""What the cluster shows of a curriculum's attempts, in the words of the state machine. Pure.

The program's own report (the progress ConfigMap) decides first, what Ray says of the job second, KubeRay's reason third. KubeRay
looks at the submitter's Job before it asks Ray, so a program that said exit 1, or one that had finished, may end as
`SubmissionFailed`; a replaced head arrives as `AppFailed`; `Complete` only says that Ray ended; a dead node leaves a RayJob `Running`
for ever; and a RayJob that Kueue preempted starts again under the same name. A report counts only if it is of this attempt; its
result ends the stage whatever else is seen, and its exit status counts if it is of this RayCluster.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from terrace.cluster.attempt import AttemptObservation, FailureKind
from terrace.cluster.cluster_schema import CurriculumSpec
from terrace.cluster.manifests import LABEL_ATTEMPT, LABEL_STAGE, rayjob_name
from terrace.curriculum.actions import Observation
from terrace.curriculum.state import RunState, StageState
from terrace_operator.codec import Memory

Manifest = dict[str, Any]
ENDED = ("Complete", "Failed")
EXIT_CODE = re.compile(r"exit code:? (\d+)")
HEAD_DIED = re.compile(r"supervisor actor|node (has )?died|JobSupervisor|Unable to schedule|Ray job not found", re.IGNORECASE)
PROGRAM_REASONS = ("", "AppFailed")
PROGRAM_EXITS = range(1, 128)  # what a program says itself; above, a signal ended it
HOLDS_PODS = ("Initializing", "Running", "Suspending")
REPORT_GRACE_SECONDS = 60.0  # between the end of a program and its last report being seen
CLOSE_GRACE_SECONDS = 60.0  # between a program's last report and KubeRay closing its RayJob; then it is deleted


@dataclass(frozen=True)
class World:
    """Everything seen of one curriculum. Seconds are of a clock that only runs forward, since this operator first saw it so."""

    rayjobs: dict[str, Manifest] = field(default_factory=dict)
    reports: tuple[Manifest, ...] = ()  # progress.json of each stage that runs by itself, parsed
    directives: dict[str, Manifest] = field(default_factory=dict)  # directive.json by the prefix of its key, parsed
    # Stage index -> seconds since its report last changed, its quota came or went, or its program began or ended.
    quiet_seconds: dict[int, float] = field(default_factory=dict)
    deleting_seconds: dict[str, float] = field(default_factory=dict)  # RayJob -> since its deletion was first seen
    ended_seconds: dict[str, float] = field(default_factory=dict)  # RayJob -> since its end was first seen
    workloads: dict[str, Manifest] = field(default_factory=dict)  # RayJob name -> Kueue Workload
    recipes: dict[str, str] = field(default_factory=dict)  # recipe ConfigMap -> YAML
    refused: dict[str, str] = field(default_factory=dict)  # RayJob -> why the API server refused to create it
    objects: frozenset[str] = frozenset()  # "<kind>/<name>" of the other objects that exist
    absent: frozenset[str] = frozenset()  # kinds that the cluster does not know

    def quiet(self, stage: StageState) -> float:
        return self.quiet_seconds.get(stage.index, 0.0)


def report_of(world: World, stage: str, attempt: int) -> Manifest | None:
    """The report, if it is of this attempt: reports of older attempts are ignored."""
    return next((report for report in world.reports if (report.get("stage"), report.get("attempt")) == (stage, attempt)), None)


def speaks(report: Manifest | None, job: Manifest) -> bool:
    """Whether the program of the job's present RayCluster has reported and not ended (a preempted one's last words remain)."""
    if not report or report.get("exit"):
        return False
    return not report.get("cluster") or report["cluster"] == status_of(job).get("rayClusterName")


def is_suspended(job: Manifest) -> bool:
    return bool(job.get("spec", {}).get("suspend"))


def is_queued(job: Manifest) -> bool:
    """Waiting for quota, or losing it."""
    return is_suspended(job) or status_of(job).get("jobDeploymentStatus") in ("Suspending", "Suspended")


def status_of(job: Manifest) -> Manifest:
    return job.get("status") or {}


def is_fenced(spec: CurriculumSpec, world: World, name: str) -> bool:
    """Its pods did not go in time (their node is dead): its attempt number keeps it from writing, so it no longer counts."""
    return world.deleting_seconds.get(name, 0.0) > spec.failure_policy.fence_timeout_seconds


def observe(curriculum: str, spec: CurriculumSpec, state: RunState, memory: Memory, world: World, now: float) -> Observation:
    """The state machine's observation. `memory.admitted_at` must be up to date (see `follow_queue`)."""
    names = {stage.index: stage.name for stage in state.stages}
    live = []
    for name, job in world.rayjobs.items():
        labels = job["metadata"].get("labels", {})
        index, attempt = int(labels.get(LABEL_STAGE, -1)), int(labels.get(LABEL_ATTEMPT, 0))
        ended_well = status_of(job).get("jobDeploymentStatus") == "Complete" and status_of(job).get("jobStatus") == "SUCCEEDED"
        if index in names and not ended_well and not is_fenced(spec, world, name):
            live.append((names[index], attempt))
    seen = tuple(_attempt(curriculum, spec, stage, memory, world, now) for stage in state.stages if not stage.ended)
    return Observation(attempts=seen, live=tuple(sorted(live)))


def _attempt(curriculum: str, spec: CurriculumSpec, stage: StageState, memory: Memory, world: World, now: float) -> AttemptObservation:
    name = rayjob_name(curriculum, stage.index, stage.attempt)
    job = world.rayjobs.get(name)
    report = report_of(world, stage.name, stage.attempt)

    def seen(status: Any, **values: Any) -> AttemptObservation:
        return AttemptObservation(stage.name, stage.attempt, status, step=(report or {}).get("step"), **values)

    leaving = job is None or bool(job["metadata"].get("deletionTimestamp"))
    if is_done(report):
        # Whatever KubeRay makes of it, and even if its RayJob is gone: the stage is done and must not run again.
        closed = leaving or status_of(job or {}).get("jobDeploymentStatus") in ENDED
        return seen("succeeded", live=not closed and world.quiet(stage) < CLOSE_GRACE_SECONDS, result=(report or {})["result"])
    if job is None or leaving:
        return _leaving(spec, stage, name, job, report, world, seen)
    status = status_of(job)
    if status.get("jobDeploymentStatus", "") in (*ENDED, "ValidationFailed"):
        return _ended(status, report, world.ended_seconds.get(name, 0.0), now, seen)
    if is_queued(job) or name not in memory.admitted_at:
        return _queued(spec, job, world.quiet(stage), now, seen)
    if exit_code(status, report)[0] in PROGRAM_EXITS or status.get("jobStatus") in ("FAILED", "STOPPED"):
        # The program has ended and KubeRay still waits for its submitter: no reason to hold the GPUs meanwhile.
        return _ended(status, report, 0.0, now, seen)
    # The wall clock may jump and the operator may have been away: only seconds it watched itself count as waiting or silence.
    if program_runs(report, job):
        return seen("running", live=True, progress_at=now - world.quiet(stage))
    limit = spec.failure_policy.pre_running_timeout_seconds
    if world.quiet(stage) > limit:
        message = f"admitted {world.quiet(stage):.0f} s ago and the program has not started (preRunningTimeoutSeconds: {limit})"
        return seen("failed", live=True, failure="infrastructure", reason="PreRunningDeadlineExceeded", message=message)
    return seen("starting", live=True, progress_at=now)


def _leaving(
    spec: CurriculumSpec, stage: StageState, name: str, job: Manifest | None, report: Manifest | None, world: World, seen: Any
) -> AttemptObservation:
    """Its RayJob is gone, or going."""
    live = job is not None and not is_fenced(spec, world, name)
    ended = (report or {}).get("exit") or {}
    if ended.get("status") in PROGRAM_EXITS:
        # It had ended before its RayJob went: the failure is its own, whoever deleted the RayJob.
        kind, reason = classify({}, ended["status"])
        return seen("failed", live=live, failure=kind, reason=reason, message=str(ended.get("message") or "")[:1000])
    if job is None and not stage.launched and name in world.refused:
        return seen("failed", failure="infrastructure", reason="CreateRefused", message=world.refused[name])
    if job is not None and stage.stop_deadline is not None:
        return seen("preempted", live=True, message="stopped on request")
    return seen("absent", live=live)


def _queued(spec: CurriculumSpec, job: Manifest, quiet: float, now: float, seen: Any) -> AttemptObservation:
    """It waits for quota, which is not stalling, however long; unless its own pods keep it from getting there."""
    holds_pods = is_suspended(job) and status_of(job).get("jobDeploymentStatus") in HOLDS_PODS
    if holds_pods and quiet > spec.failure_policy.fence_timeout_seconds + CLOSE_GRACE_SECONDS:
        # A queue that takes its quota back from pods of a dead node never gets it: they stay, and the RayJob is never Suspended.
        message = f"the queue took the quota back {quiet:.0f} s ago and its pods do not end: their node is probably dead"
        return seen("failed", live=True, failure="infrastructure", reason="OldPodsTerminating", message=message)
    return seen("starting", live=True, progress_at=now)


def is_done(report: Manifest | None) -> bool:
    """Whether the program has reported the stage's result and a good end."""
    return report is not None and report.get("result") is not None and (report.get("exit") or {}).get("status") == 0


def program_runs(report: Manifest | None, job: Manifest) -> bool:
    """Whether the program of the job has begun: from then on silence means a stall."""
    return status_of(job).get("jobStatus") == "RUNNING" or speaks(report, job)


def silence_limit(curriculum: str, spec: CurriculumSpec, stage: StageState, world: World) -> float | None:
    """Seconds of silence after which the stage's attempt is replaced; None while it may be silent: queued, ending, gone."""
    job = world.rayjobs.get(rayjob_name(curriculum, stage.index, stage.attempt))
    if job is None or job["metadata"].get("deletionTimestamp") or is_queued(job) or status_of(job).get("jobDeploymentStatus") in ENDED:
        return None
    report = report_of(world, stage.name, stage.attempt)
    if is_done(report):
        return CLOSE_GRACE_SECONDS
    if program_runs(report, job):
        return spec.recipe.stages[stage.index].failure.stall_timeout_seconds
    return float(spec.failure_policy.pre_running_timeout_seconds)


def _ended(status: Manifest, report: Manifest | None, ended_seconds: float, now: float, seen: Any) -> AttemptObservation:
    deployment, ended = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    message = str(status.get("message") or "")[:1000]
    if deployment == "Complete" and ended == "SUCCEEDED":
        result = (report or {}).get("result")
        # The last report and the RayJob's status are seen through different watches: wait a little for the later one.
        waiting = result is None and ended_seconds < REPORT_GRACE_SECONDS
        return seen("succeeded", live=waiting, result=result, message=message)
    if ended == "SUCCEEDED" and ended_seconds < REPORT_GRACE_SECONDS:
        # The program ended well, KubeRay did not: its last report may still be on its way.
        return seen("running", live=True, progress_at=now)
    code, told = exit_code(status, report)
    if code == 143:
        return seen("preempted", live=True, reason="Preempted", message=told or "stopped after a checkpoint")
    if deployment == "ValidationFailed":
        return seen("failed", live=True, failure="input", reason="ValidationFailed", message=message)
    kind, reason = classify(status, code)
    return seen("failed", live=True, failure=kind, reason=reason, message=told or message or reason)


def exit_code(status: Manifest, report: Manifest | None) -> tuple[int | None, str]:
    """Exit status and last words of the program, from its report if that is of this RayCluster, else from what Ray said of it."""
    ended = (report or {}).get("exit")
    cluster = (report or {}).get("cluster")
    if ended and (not cluster or cluster == status.get("rayClusterName")):
        return ended.get("status"), str(ended.get("message") or "")[:1000]
    if (status.get("reason") or "") not in PROGRAM_REASONS:
        return None, ""  # an exit status in KubeRay's words on other reasons is that of its submitter
    found = EXIT_CODE.search(str(status.get("message") or ""))
    return (int(found.group(1)) if found else None), ""


def classify(status: Manifest, code: int | None) -> tuple[FailureKind, str]:
    """Whose failure it is: the input's (never tried again), the program's, or the infrastructure's."""
    reason, message = status.get("reason") or "", str(status.get("message") or "")
    if code == 2:
        return "input", "InputWrong"
    if code in PROGRAM_EXITS:
        return "program", "AppFailed"
    if code is not None and 128 < code < 192 and code not in (134, 139):
        return "infrastructure", "Killed"  # SIGKILL (out of memory on the node, eviction); abort and segfault are the program's
    if code is None and HEAD_DIED.search(message):
        return "infrastructure", "HeadLost"
    if reason in PROGRAM_REASONS and status.get("jobStatus") != "STOPPED":
        return "program", reason or "AppFailed"
    return "infrastructure", reason or "Stopped"


def follow_queue(curriculum: str, state: RunState, memory: Memory, world: World, now: float) -> list[tuple[str, str]]:
    """Update `memory` with quota got and lost; returns events (reason, message). Preemptions count in no failure budget."""
    events = []
    running = {rayjob_name(curriculum, stage.index, stage.attempt) for stage in state.attempts_in_flight}
    memory.admitted_at = {name: since for name, since in memory.admitted_at.items() if name in running}
    for stage in state.attempts_in_flight:
        name = rayjob_name(curriculum, stage.index, stage.attempt)
        job = world.rayjobs.get(name)
        if job is None or job["metadata"].get("deletionTimestamp"):
            continue
        if is_queued(job):
            if memory.admitted_at.pop(name, None) is not None:
                memory.queue_preemptions[stage.name] = memory.queue_preemptions.get(stage.name, 0) + 1
                events.append(("QueuePreempted", f"stage {stage.name}: the queue took the quota of {name} back; it waits again"))
        elif name not in memory.admitted_at:
            memory.admitted_at[name] = now
            events.append(("Admitted", f"stage {stage.name}: {name} may start"))
    return events
