"""The state machine over stages: (recipe, journal, what is seen, the time) -> what to do next. Pure.

No clock, no files, no Ray: every launcher and the Kubernetes operator use this one function. Whoever calls it carries
the actions out in order, appending a `Record`'s event to the journal before the action after it, and calls again. A
crash between any two actions is harmless: an attempt is recorded before it is launched, launching is create-or-adopt,
and everything decided here is decided again from the journal. The rules:

- Stages run in order; an attempt starts only when nothing of any other attempt may still run.
- A program failure and an infrastructure failure have separate budgets and wait an exponentially growing time; a
  preemption and the death of an attempt together with its controller count in neither and continue at once. Wrong
  input is not tried again.
- No sign of progress for `stall_timeout_seconds` is an infrastructure failure.
- pause: the stage in flight is finished, no other starts. suspend and cancel: checkpoint, end, release everything.
- succeeded, failed and cancelled are terminal: only a person's request (resume of a failed run, rerun) starts
  anything again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from terrace.cluster.attempt import AttemptObservation
from terrace.curriculum.state import TERMINAL, Event, RunState, StageState, fold
from terrace.recipe.schema import Failure, Gate, Recipe

POLL_SECONDS = 1.0
EXIT_STOPPED = 143


@dataclass(frozen=True)
class Observation:
    """What the controller sees now. `attempts` holds at least the newest attempt of every stage in flight."""

    attempts: tuple[AttemptObservation, ...] = ()
    live: tuple[tuple[str, int], ...] = ()  # every (stage, attempt) of which something may still run
    interrupted: bool = False  # the controller itself was told to stop (SIGTERM): checkpoint and leave, the run goes on later

    def attempt(self, stage: StageState) -> AttemptObservation:
        for seen in self.attempts:
            if (seen.stage, seen.attempt) == (stage.name, stage.attempt):
                return seen
        return AttemptObservation(stage.name, stage.attempt, "absent")


@dataclass(frozen=True)
class Record:
    """Append this event to the journal (the writer adds time and sequence)."""

    event: dict[str, Any]


@dataclass(frozen=True)
class Prepare:
    """Ingest and index the data, train or copy the tokenizer. Idempotent."""


@dataclass(frozen=True)
class Clear:
    """Move what earlier runs of the stage wrote aside, under this rerun number. Idempotent."""

    stage_index: int
    stage: str
    rerun: int


@dataclass(frozen=True)
class Launch:
    """Start the attempt or adopt it."""

    stage_index: int
    stage: str
    attempt: int


@dataclass(frozen=True)
class Stop:
    """Ask the attempt to checkpoint and end, or (`force`) end it at once. Idempotent."""

    stage_index: int
    stage: str
    attempt: int
    reason: str
    force: bool = False


@dataclass(frozen=True)
class Wait:
    """Nothing to do before `until` (seconds since the epoch) or the next event."""

    until: float
    reason: str


@dataclass(frozen=True)
class Finish:
    """The controller's work is done: leave with this status."""

    phase: str
    exit_status: int
    message: str = field(default="")


Action = Record | Prepare | Clear | Launch | Stop | Wait | Finish


def step(recipe: Recipe, events: Iterable[Event], observation: Observation, now: float) -> list[Action]:
    """The next actions, in order. Never empty; the last is Wait, Finish, or changes what is seen next time."""
    return next_actions(recipe, fold([stage.name for stage in recipe.stages], events), observation, now)


def next_actions(recipe: Recipe, state: RunState, observation: Observation, now: float) -> list[Action]:
    """`step` for a caller that keeps the folded state."""
    if state.phase == "new":
        return [Record({"event": "run_started", "stages": [stage.name for stage in recipe.stages]})]
    if state.phase in TERMINAL or (state.phase in ("paused", "suspended") and state.request != "cancel"):
        return _release(state, observation, now) or [_finish(state)]
    for stage in state.attempts_in_flight:
        return _follow(recipe.stages[stage.index].failure, state, stage, observation, now)
    if stopping := _release(state, observation, now):
        return stopping
    if state.request == "cancel":
        return [Record({"event": "cancelled", "reason": "CancelRequested", "message": "cancelled on request"})]
    if state.request == "suspend":
        return [Record({"event": "suspended", "reason": "SuspendRequested", "message": "suspended on request"})]
    if observation.interrupted:
        return [Finish("interrupted", EXIT_STOPPED, "stopped on a signal; the same command continues the run")]
    return _between_attempts(recipe, state, now)


def _between_attempts(recipe: Recipe, state: RunState, now: float) -> list[Action]:
    """Nothing runs and nothing forbids that something does."""
    stage = state.current
    if stage and (failed := _budget_spent(recipe.stages[stage.index].failure, stage)):
        return [Record(failed)]
    for other in state.stages:
        if other.must_clear:
            return [
                Clear(other.index, other.name, other.reruns),
                Record({"event": "stage_cleared", "stage": other.name}),
            ]
    for done in state.stages:
        if done.phase == "completed" and (records := _gates(recipe.stages[done.index].gates, done)):
            return [Record(event) for event in records]
    if stage is None:
        return [Record({"event": "run_completed", "reason": "Succeeded", "message": "all stages are complete"})]
    if state.request == "pause" and stage.phase == "pending":
        message = f"paused on request before stage {stage.name}"
        return [Record({"event": "paused", "reason": "PauseRequested", "message": message})]
    cap = recipe.stages[stage.index].failure.backoff_cap_seconds
    # A retry time further away than any backoff comes from a clock that jumped: do not wait for it.
    if stage.phase == "waiting" and stage.retry_at is not None and now < stage.retry_at <= now + cap:
        return [Wait(stage.retry_at, f"stage {stage.name} is tried again after {stage.reason or 'a failure'}")]
    if not state.prepared:
        return [Prepare()]
    source = source_stage(recipe, stage.index)
    actions: list[Action] = []
    if source is not None and not stage.handed_over:
        actions.append(Record({"event": "handed_over", "stage": stage.name, "from": source}))
    attempt = stage.attempt + 1
    actions.append(Record({"event": "stage_attempt_started", "stage": stage.name, "attempt": attempt}))
    return [*actions, Launch(stage.index, stage.name, attempt)]


def source_stage(recipe: Recipe, index: int) -> str | None:
    """The stage whose final weights stage `index` starts from; None for the first."""
    return recipe.stages[index].start_from or (recipe.stages[index - 1].name if index else None)


def backoff_seconds(failure: Failure, failures: int) -> float:
    """Seconds to wait after the `failures`-th failure (from 1): doubles each time, up to the cap."""
    doublings = min(max(failures - 1, 0), 60)
    return min(failure.backoff_cap_seconds, failure.backoff_seconds * 2.0**doublings)


def _finish(state: RunState) -> Finish:
    if state.phase == "succeeded":
        return Finish("succeeded", 0, state.message)
    if state.phase == "failed":
        return Finish("failed", 2 if state.reason == "InputWrong" else 1, state.message)
    if state.phase in ("paused", "suspended") and state.reason != "GateMissed":
        return Finish(state.phase, EXIT_STOPPED, state.message)
    return Finish(state.phase, 1, state.message)


def _release(state: RunState, observation: Observation, now: float) -> list[Action]:
    """Stop whatever still runs of attempts that are over, and wait for it; nothing to do: an empty list."""
    actions: list[Action] = []
    for name, attempt in observation.live:
        stage = state.stage(name)
        if stage is not None:
            actions.append(Stop(stage.index, name, attempt, "the attempt is over", force=True))
    return [*actions, Wait(now + POLL_SECONDS, "an earlier attempt is still ending")] if actions else []


def _follow(failure: Failure, state: RunState, stage: StageState, observation: Observation, now: float) -> list[Action]:
    """One attempt is in flight: end it in the journal when it is over, stop it when it must, or wait."""
    seen = observation.attempt(stage)
    must_stop = "interrupted" if observation.interrupted else None
    must_stop = state.request if state.request in ("suspend", "cancel") else must_stop
    identity = {"stage": stage.name, "attempt": stage.attempt}
    if seen.status == "succeeded":
        if seen.live:  # its processes still end; the next stage's must not meet them
            return [Wait(now + POLL_SECONDS, "the attempt is ending")]
        if seen.result is None:
            return [_failed(failure, stage, "program", "NoResult", "the attempt ended without a result", now)]
        return [Record({"event": "stage_completed", **identity, "result": seen.result})]
    if seen.status == "absent" and not stage.launched and not must_stop:
        others = [entry for entry in observation.live if entry != (stage.name, stage.attempt)]
        if others:
            return _release(state, Observation(live=tuple(others)), now)
        return [Launch(stage.index, stage.name, stage.attempt)]
    if seen.status in ("starting", "running"):
        actions: list[Action] = []
        if not stage.launched:
            actions.append(Record({"event": "stage_attempt_launched", **identity}))
        if must_stop:
            return actions + _stop(failure, stage, must_stop, now)
        quiet_since = max(value for value in (seen.progress_at, stage.attempt_started_at, 0.0) if value is not None)
        if now - quiet_since > failure.stall_timeout_seconds:
            message = f"no progress for {now - quiet_since:.0f} s (stall_timeout_seconds: {failure.stall_timeout_seconds:g})"
            stalled = _failed(failure, stage, "infrastructure", "Stalled", message, now)
            return [*actions, stalled, Stop(stage.index, stage.name, stage.attempt, message, force=True)]
        return [*actions, Wait(now + POLL_SECONDS, f"stage {stage.name} attempt {stage.attempt} is running")]
    # It is over. What ended after it was told to stop is no failure, however it ended.
    if seen.status == "preempted" or must_stop or stage.stop_deadline is not None:
        reason = "Preempted" if seen.status == "preempted" else "StoppedWithoutCheckpoint"
        return [
            Record(
                {
                    "event": "stage_attempt_preempted",
                    **identity,
                    "reason": reason,
                    "message": seen.message,
                    "retry_at": now,
                }
            )
        ]
    if seen.status == "interrupted":
        message = seen.message or "the attempt died together with its controller"
        return [
            Record(
                {
                    "event": "stage_attempt_interrupted",
                    **identity,
                    "reason": "Interrupted",
                    "message": message,
                    "retry_at": now,
                }
            )
        ]
    if seen.status == "absent":
        return [_failed(failure, stage, "infrastructure", "AttemptLost", "the attempt vanished without an outcome", now)]
    return [_failed(failure, stage, seen.failure or "program", seen.reason or "ProgramFailed", seen.message, now)]


def _stop(failure: Failure, stage: StageState, why: str, now: float) -> list[Action]:
    """Ask once, write down until when, then force. A deadline beyond any grace comes from a clock that jumped."""
    grace = failure.preemption_grace_seconds
    ask = Stop(stage.index, stage.name, stage.attempt, why)
    if stage.stop_deadline is None or stage.stop_deadline > now + grace:
        event = {
            "event": "stop_requested",
            "stage": stage.name,
            "attempt": stage.attempt,
            "reason": why,
            "deadline": now + grace,
        }
        return [Record(event), ask]
    if now < stage.stop_deadline:
        return [
            ask,
            Wait(min(stage.stop_deadline, now + POLL_SECONDS), f"stage {stage.name} saves a checkpoint and stops"),
        ]
    forced = Stop(stage.index, stage.name, stage.attempt, f"{why}: no checkpoint within {grace:g} s", force=True)
    return [forced, Wait(now + POLL_SECONDS, f"stage {stage.name} is being ended")]


def _failed(failure: Failure, stage: StageState, kind: str, reason: str, message: str, now: float) -> Record:
    count = 1 + (stage.infrastructure_failures if kind == "infrastructure" else stage.program_failures)
    retry_at = None if kind == "input" else now + backoff_seconds(failure, count)
    reason = "InputWrong" if kind == "input" else reason
    return Record(
        {
            "event": "stage_attempt_failed",
            "stage": stage.name,
            "attempt": stage.attempt,
            "kind": kind,
            "reason": reason,
            "message": message,
            "retry_at": retry_at,
        }
    )


def _budget_spent(failure: Failure, stage: StageState) -> dict[str, Any] | None:
    """The event that fails the run, when the stage's last failure was one too many."""
    if stage.phase != "waiting":
        return None
    where = f"stage {stage.name}, attempt {stage.attempt}: {stage.message or stage.reason}"
    if stage.reason == "InputWrong":
        return {"event": "run_failed", "stage": stage.name, "reason": "InputWrong", "message": where}
    if stage.program_failures > failure.max_restarts:
        message = f"{where} (program failure {stage.program_failures}; max_restarts is {failure.max_restarts})"
        return {"event": "run_failed", "stage": stage.name, "reason": "ProgramFailuresSpent", "message": message}
    if stage.infrastructure_failures > failure.max_infrastructure_restarts:
        message = (
            f"{where} (infrastructure failure {stage.infrastructure_failures}; "
            f"max_infrastructure_restarts is {failure.max_infrastructure_restarts})"
        )
        return {"event": "run_failed", "stage": stage.name, "reason": "InfrastructureFailuresSpent", "message": message}
    return None


def metric_value(result: dict[str, Any] | None, metric: str) -> float | None:
    """A metric of a finished stage, None if it was not measured or is not finite.

    `train/<name>` is the last step's, `eval/<kind>/loss` the held-out loss after the stage, `eval/loss` its mean over kinds,
    `eval/<figure>` what an RL stage or a reward model measures instead (`eval/reward/<task>`, `eval/preference/accuracy`),
    `eval/<suite>/<name>` a suite's score, and anything else what the stage's result has under `metrics`.
    """
    result = result or {}
    losses = (result.get("evaluation") or {}).get("after") or {}
    group, _, rest = metric.partition("/")
    found = (result.get("metrics") or {}).get(metric)
    if found is None and group == "train":
        found = (result.get("train") or {}).get(rest, result.get(rest))
    elif found is None and group == "eval":
        name, _, score = rest.partition("/")
        if rest == "loss":
            values = [value for value in losses.values() if isinstance(value, int | float)]
            found = sum(values) / len(values) if values else None
        elif rest in losses:
            found = losses[rest]
        elif score == "loss" and name in losses:
            found = losses[name]
        else:
            found = ((result.get("suites") or {}).get(name) or {}).get(score)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def _gates(gates: list[Gate], stage: StageState) -> list[dict[str, Any]]:
    """Events of gates not yet looked at, and of a missed one that has not stopped the run yet."""
    records: list[dict[str, Any]] = []
    for number, gate in enumerate(gates):
        if number in stage.gates:
            continue
        value = metric_value(stage.result, gate.metric)
        bounds = [f"below {gate.below:g}"] if gate.below is not None else []
        bounds += [f"above {gate.above:g}"] if gate.above is not None else []
        passed = value is not None and (gate.below is None or value < gate.below) and (gate.above is None or value > gate.above)
        seen = "was not measured" if value is None else f"is {value:.6g}"
        records.append(
            {
                "event": "gate_passed" if passed else "gate_missed",
                "stage": stage.name,
                "gate": number,
                "metric": gate.metric,
                "value": value,
                "on_miss": gate.on_miss,
                "message": f"{gate.metric} {seen}; asked: {' and '.join(bounds)}",
            }
        )
    if records:
        return records
    order = {"fail": 0, "pause": 1}
    missed = [number for number, seen in stage.gates.items() if not seen["passed"] and not seen["handled"] and number < len(gates)]
    missed = sorted((number for number in missed if gates[number].on_miss in order), key=lambda n: order[gates[n].on_miss])
    if not missed:
        return []
    gate = gates[missed[0]]
    value = stage.gates[missed[0]]["value"]
    shown = "not measured" if value is None else f"{value:.6g}"
    message = f"stage {stage.name} missed its gate on {gate.metric} ({shown})"
    return [
        {
            "event": "run_failed" if gate.on_miss == "fail" else "paused",
            "stage": stage.name,
            "reason": "GateMissed",
            "message": message,
        }
    ]
