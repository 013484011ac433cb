"""The state machine over stages: (recipe, journal, what is seen, the time) -> what to do next. Pure.

No clock, no files, no Ray: every launcher and the Kubernetes operator use this one function. Whoever calls it carries
the actions out in order, appending a `Record`'s event to the journal before the action after it, and calls again. A
crash between any two actions is harmless: an attempt is recorded before it is launched, launching is create-or-adopt,
and everything decided here is decided again from the journal. The rules:

- Stages run in order; an attempt starts only when nothing of any other attempt may still run. In a recipe with `stage_order: graph`
  (`graph.py`) and a caller that has room (`width`), stages that do not wait for each other run side by side, and that rule is
  each stage's own. When one of them fails for good, the others save a checkpoint and stop before the run is failed.
- A program failure and an infrastructure failure have separate budgets and wait an exponentially growing time; a
  preemption and the death of an attempt together with its controller count in neither and continue at once. Wrong
  input is not tried again.
- No sign of progress for `stall_timeout_seconds` is an infrastructure failure.
- pause: the stage in flight is finished, no other starts. suspend and cancel: checkpoint, end, release everything.
- succeeded, failed and cancelled are terminal: only a person's request (resume of a failed run, rerun) starts
  anything again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from terrace.curriculum import gates
from terrace.curriculum.actions import Action, Clear, Finish, Launch, Observation, Prepare, Record, Stop, Wait
from terrace.curriculum.graph import ready_stages, source_stage
from terrace.curriculum.state import TERMINAL, Event, RunState, StageState, fold
from terrace.recipe.schema import Failure, Recipe

POLL_SECONDS = 1.0
EXIT_STOPPED = 143


def step(recipe: Recipe, events: Iterable[Event], observation: Observation, now: float) -> list[Action]:
    """The next actions, in order. Never empty; the last is Wait, Finish, or changes what is seen next time."""
    return next_actions(recipe, fold([stage.name for stage in recipe.stages], events), observation, now)


def next_actions(recipe: Recipe, state: RunState, observation: Observation, now: float, width: int = 1) -> list[Action]:
    """`step` for a caller that keeps the folded state. `width`: attempts that it can run at a time, where the recipe has a graph."""
    if state.phase == "new":
        return [Record({"event": "run_started", "stages": [stage.name for stage in recipe.stages]})]
    if state.phase in TERMINAL or (state.phase in ("paused", "suspended") and state.request != "cancel"):
        return _release(observation.live, state, now) or [_finish(state)]
    running = state.attempts_in_flight
    if running:
        must_stop = _must_stop(recipe, state, observation)
        followed = [_follow(recipe.stages[stage.index].failure, must_stop, state, stage, observation, now) for stage in running]
        actions = [action for each in followed for action in each]
        acts = [action for action in actions if not isinstance(action, Wait)]
        more = [] if acts or must_stop or recipe.stage_order == "sequence" else _side_by_side(recipe, state, observation, now, width)
        acts += [action for action in more if not isinstance(action, Wait)]
        return acts + _soonest([action for action in [*actions, *more] if isinstance(action, Wait)])
    if stopping := _release(observation.live, state, now):
        return stopping
    if state.request == "cancel":
        return [Record({"event": "cancelled", "reason": "CancelRequested", "message": "cancelled on request"})]
    if state.request == "suspend":
        return [Record({"event": "suspended", "reason": "SuspendRequested", "message": "suspended on request"})]
    if observation.interrupted:
        return [Finish("interrupted", EXIT_STOPPED, "stopped on a signal; the same command continues the run")]
    return _between_attempts(recipe, state, now, width)


def _must_stop(recipe: Recipe, state: RunState, observation: Observation) -> str | None:
    """Why every attempt in flight is to save a checkpoint and end; None: nothing asks for it."""
    if state.request in ("suspend", "cancel"):
        return state.request
    if observation.interrupted:
        return "interrupted"
    return "failed" if any(event["event"] == "run_failed" for event in _obstacles(recipe, state)) else None


def _obstacles(recipe: Recipe, state: RunState) -> list[dict[str, Any]]:
    """Events that end or pause the run once nothing is in flight: a budget that is spent, a gate that was missed."""
    spent = (_budget_spent(recipe.stages[stage.index].failure, stage) for stage in state.stages)
    missed = (gates.missed(recipe.stages[stage.index].gates, stage) for stage in state.stages if stage.phase == "completed")
    return [event for event in (*spent, *missed) if event]


def _soonest(waits: list[Wait]) -> list[Action]:
    return [min(waits, key=lambda wait: wait.until)] if waits else []


def _side_by_side(recipe: Recipe, state: RunState, observation: Observation, now: float, width: int) -> list[Action]:
    """What else may be done while attempts are in flight and none of them needs anything."""
    in_flight = {(stage.name, stage.attempt) for stage in state.attempts_in_flight}
    over = tuple(entry for entry in observation.live if entry not in in_flight)
    return _release(over, state, now) or _between_attempts(recipe, state, now, width)


def _between_attempts(recipe: Recipe, state: RunState, now: float, width: int) -> list[Action]:
    """Nothing forbids that something starts. An empty list: nothing to do until an attempt in flight has ended."""
    running = len(state.attempts_in_flight)
    spent = [event for event in _obstacles(recipe, state) if event["event"] == "run_failed" and event["reason"] != "GateMissed"]
    if spent:
        return [] if running else [Record(spent[0])]
    for other in state.stages:
        if other.must_clear:
            return [
                Clear(other.index, other.name, other.reruns),
                Record({"event": "stage_cleared", "stage": other.name}),
            ]
    for done in state.stages:
        if done.phase == "completed" and (records := gates.looked_at(recipe.stages[done.index].gates, done)):
            return [Record(event) for event in records]
        if done.phase == "completed" and (missed := gates.missed(recipe.stages[done.index].gates, done)):
            return [] if running else [Record(missed)]
    ready = ready_stages(recipe, state)
    if not ready and not running:
        return [Record({"event": "run_completed", "reason": "Succeeded", "message": "all stages are complete"})]
    if state.request == "pause":
        begun = [stage for stage in ready if stage.phase != "pending"]
        if not begun and not running:
            message = f"paused on request before stage {ready[0].name}"
            return [Record({"event": "paused", "reason": "PauseRequested", "message": message})]
        ready = begun
    waits: list[Wait] = []
    for stage in ready if running < width else ():
        cap = recipe.stages[stage.index].failure.backoff_cap_seconds
        # A retry time further away than any backoff comes from a clock that jumped: do not wait for it.
        if stage.phase == "waiting" and stage.retry_at is not None and now < stage.retry_at <= now + cap:
            waits.append(Wait(stage.retry_at, f"stage {stage.name} is tried again after {stage.reason or 'a failure'}"))
            continue
        return [Prepare()] if not state.prepared else _start(recipe, stage)
    return _soonest(waits)


def _start(recipe: Recipe, stage: StageState) -> list[Action]:
    source = source_stage(recipe, stage.index)
    actions: list[Action] = []
    if source is not None and not stage.handed_over:
        actions.append(Record({"event": "handed_over", "stage": stage.name, "from": source}))
    attempt = stage.attempt + 1
    actions.append(Record({"event": "stage_attempt_started", "stage": stage.name, "attempt": attempt}))
    return [*actions, Launch(stage.index, stage.name, attempt)]


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


def _release(live: Iterable[tuple[str, int]], state: RunState, now: float) -> list[Action]:
    """Stop whatever still runs of attempts that are over, and wait for it; nothing to do: an empty list."""
    actions: list[Action] = []
    for name, attempt in live:
        stage = state.stage(name)
        if stage is not None:
            actions.append(Stop(stage.index, name, attempt, "the attempt is over", force=True))
    return [*actions, Wait(now + POLL_SECONDS, "an earlier attempt is still ending")] if actions else []


def _follow(
    failure: Failure, must_stop: str | None, state: RunState, stage: StageState, observation: Observation, now: float
) -> list[Action]:
    """One attempt is in flight: end it in the journal when it is over, stop it when it must, or wait."""
    seen = observation.attempt(stage)
    identity = {"stage": stage.name, "attempt": stage.attempt}
    if seen.status == "succeeded":
        if seen.live:  # its processes still end; the next stage's must not meet them
            return [Wait(now + POLL_SECONDS, "the attempt is ending")]
        if seen.result is None:
            return [_failed(failure, stage, "program", "NoResult", "the attempt ended without a result", now)]
        return [Record({"event": "stage_completed", **identity, "result": seen.result})]
    if seen.status == "absent" and not stage.launched and not must_stop:
        in_flight = {(other.name, other.attempt) for other in state.attempts_in_flight}
        others = [entry for entry in observation.live if entry not in in_flight]
        return _release(others, state, now) or [Launch(stage.index, stage.name, stage.attempt)]
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
    why = str(stage.message or stage.reason).removeprefix(f"stage {stage.name}: ")
    where = f"stage {stage.name}, attempt {stage.attempt}: {why}"
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


