"""Where a run stands: a fold over its journal's events. Pure values, no clock, no files.

Everything that must survive a crash is in the events; `apply` adds one event to the state. Events of a kind that this
version does not know are skipped, so that a newer journal can still be read. The words of the events are the contract
with whoever reads `journal.jsonl`; they are listed at `apply`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Event = Mapping[str, Any]
RunPhase = Literal["new", "running", "paused", "suspended", "succeeded", "failed", "cancelled"]
StagePhase = Literal["pending", "running", "waiting", "completed"]
TERMINAL: tuple[str, ...] = ("succeeded", "failed", "cancelled")


@dataclass
class StageState:
    """One stage. `attempt` is the newest attempt's number; numbers never repeat, a rerun continues them."""

    name: str
    index: int
    phase: StagePhase = "pending"
    attempt: int = 0
    launched: bool = False  # the newest attempt was seen by its launcher, so its absence now means that it was lost
    ended: bool = True  # the newest attempt's end is in the journal
    program_failures: int = 0
    infrastructure_failures: int = 0
    preemptions: int = 0
    interruptions: int = 0
    reruns: int = 0
    started_at: float | None = None
    attempt_started_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    retry_at: float | None = None
    stop_deadline: float | None = None
    force_stop: bool = False  # the newest attempt is to be ended without a checkpoint
    reason: str = ""
    message: str = ""
    result: dict[str, Any] | None = None
    gates: dict[int, dict[str, Any]] = field(default_factory=dict)
    starts_from: str | None = None
    handed_over: bool = False
    must_clear: bool = False
    checkpoint_step: int | None = None
    tracking_run: str | None = None


@dataclass
class RunState:
    """The whole run. `request` is what a person asked for and has not happened yet."""

    stages: list[StageState]
    phase: RunPhase = "new"
    request: Literal["pause", "suspend", "cancel"] | None = None
    prepared: bool = False
    samples: dict[str, int] = field(default_factory=dict)  # by source, those to train on
    refused: dict[str, dict[str, int]] = field(default_factory=dict)  # by source and reason, those that are left out
    recipe_hash: str | None = None
    reason: str = ""
    message: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    tracking_run: str | None = None
    commands: set[str] = field(default_factory=set)  # ids of the requests already in the journal
    events: int = 0
    unknown_events: int = 0

    def stage(self, name: Any) -> StageState | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def current(self) -> StageState | None:
        """The first stage that is not completed; None when all are."""
        return next((stage for stage in self.stages if stage.phase != "completed"), None)

    @property
    def attempts_in_flight(self) -> list[StageState]:
        return [stage for stage in self.stages if not stage.ended]


def new_state(stage_names: Sequence[str]) -> RunState:
    return RunState([StageState(name, index) for index, name in enumerate(stage_names)])


def fold(stage_names: Sequence[str], events: Iterable[Event]) -> RunState:
    """The state after these events, for a recipe with these stages."""
    state = new_state(stage_names)
    for event in events:
        apply(state, event)
    return state


def apply(state: RunState, event: Event) -> None:
    """Add one event to the state, in place.

    Run: run_started, recipe_changed, data_prepared, controller_started, tracking_started, paused, suspended,
    cancelled, resumed, run_completed, run_failed. Requests: pause_requested, suspend_requested, cancel_requested,
    resume_requested, rerun_requested. Stage: handed_over, stage_cleared, stage_attempt_started,
    stage_attempt_launched, stop_requested, checkpoint_saved, stage_attempt_failed, stage_attempt_preempted,
    stage_attempt_interrupted, stage_completed, gate_passed, gate_missed, stage_tracking_started.
    """
    state.events += 1
    if command := event.get("command"):
        state.commands.add(command)
    kind = event.get("event")
    handler = _RUN_EVENTS.get(kind)
    if handler:
        handler(state, event)
        return
    stage_handler = _STAGE_EVENTS.get(kind)
    stage = state.stage(event.get("stage"))
    if stage_handler is None or stage is None:
        state.unknown_events += 1
        return
    # An event of an older attempt (a late report) must not change what is known of the newest one.
    if "attempt" in event and kind != "stage_attempt_started" and event["attempt"] != stage.attempt:
        return
    stage_handler(stage, event)


# ---------------------------------------------------------------- the run's own events


def _run_started(state: RunState, event: Event) -> None:
    state.phase, state.started_at = "running", event.get("time")
    state.recipe_hash = event.get("recipe_hash")


def _recipe_changed(state: RunState, event: Event) -> None:
    state.recipe_hash, state.prepared = event.get("recipe_hash"), False


def _controller_started(state: RunState, event: Event) -> None:
    state.prepared = False  # preparing is idempotent and cheap when done, and somebody may have emptied the data folder


def _data_prepared(state: RunState, event: Event) -> None:
    state.prepared, state.samples, state.refused = True, event.get("sources") or {}, event.get("refused") or {}


def _tracking_started(state: RunState, event: Event) -> None:
    state.tracking_run = event.get("run_id")


def _request(name: Literal["pause", "suspend", "cancel"]):
    order = {None: 0, "pause": 1, "suspend": 2, "cancel": 3}

    def handler(state: RunState, event: Event) -> None:
        # A stronger request replaces a weaker one, never the other way round; a finished run takes none.
        if state.phase in TERMINAL or order[name] < order[state.request]:
            return
        state.request = name
        if state.phase in ("paused", "suspended") and name != "cancel":
            state.request = None

    return handler


def _stopped(phase: RunPhase):
    def handler(state: RunState, event: Event) -> None:
        state.phase, state.request = phase, None
        state.reason, state.message = event.get("reason", ""), event.get("message", "")
        if phase in TERMINAL:
            state.ended_at = event.get("time")
        for stage in state.stages:  # a missed gate that stopped the run once must not stop it again after a resume
            for gate in stage.gates.values():
                gate["handled"] = True

    return handler


def _resume_requested(state: RunState, event: Event) -> None:
    """Continue a paused, suspended or failed run. The stage that failed gets its whole budgets again."""
    if state.phase in ("succeeded", "cancelled", "new"):
        return
    if state.phase == "failed":
        for stage in state.stages:
            if stage.phase == "waiting":
                stage.program_failures = stage.infrastructure_failures = 0
                stage.retry_at, stage.reason, stage.message = None, "", ""
    state.phase, state.request, state.ended_at = "running", None, None
    state.reason = state.message = ""


def _rerun_requested(state: RunState, event: Event) -> None:
    """Run this stage and all that wait for it again; what they had written is moved aside before they start.

    The event names them in `stages`; without, they are those after it.
    """
    first = state.stage(event.get("stage"))
    if first is None or state.phase == "new" or state.attempts_in_flight:
        return
    named = event.get("stages")
    for stage in state.stages[first.index :]:
        if named is not None and stage.name not in named:
            continue
        touched = stage.attempt > 0
        state.stages[stage.index] = StageState(
            stage.name,
            stage.index,
            attempt=stage.attempt,
            reruns=stage.reruns + touched,
            must_clear=touched or stage.must_clear,
        )
    state.phase, state.request, state.ended_at = "running", None, None
    state.reason = state.message = ""


_RUN_EVENTS = {
    "run_started": _run_started,
    "recipe_changed": _recipe_changed,
    "controller_started": _controller_started,
    "data_prepared": _data_prepared,
    "tracking_started": _tracking_started,
    "pause_requested": _request("pause"),
    "suspend_requested": _request("suspend"),
    "cancel_requested": _request("cancel"),
    "resume_requested": _resume_requested,
    "rerun_requested": _rerun_requested,
    "paused": _stopped("paused"),
    "suspended": _stopped("suspended"),
    "cancelled": _stopped("cancelled"),
    "run_completed": _stopped("succeeded"),
    "run_failed": _stopped("failed"),
}


# ---------------------------------------------------------------- one stage's events


def _handed_over(stage: StageState, event: Event) -> None:
    stage.handed_over, stage.starts_from = True, event.get("from")


def _stage_cleared(stage: StageState, event: Event) -> None:
    stage.must_clear = False


def _attempt_started(stage: StageState, event: Event) -> None:
    stage.phase, stage.attempt = "running", event["attempt"]
    stage.launched, stage.ended, stage.force_stop = False, False, False
    stage.attempt_started_at = event.get("time")
    stage.started_at = stage.started_at if stage.started_at is not None else event.get("time")
    stage.stop_deadline = stage.retry_at = None
    stage.reason = stage.message = ""


def _attempt_launched(stage: StageState, event: Event) -> None:
    stage.launched = True


def _stop_requested(stage: StageState, event: Event) -> None:
    stage.stop_deadline = event.get("deadline")


def _checkpoint_saved(stage: StageState, event: Event) -> None:
    stage.checkpoint_step = event.get("step")


def _attempt_over(stage: StageState, event: Event) -> None:
    stage.phase, stage.ended = "waiting", True
    stage.failed_at, stage.retry_at = event.get("time"), event.get("retry_at")
    stage.reason, stage.message = event.get("reason", ""), event.get("message", "")
    stage.stop_deadline = None


def _attempt_failed(stage: StageState, event: Event) -> None:
    _attempt_over(stage, event)
    if event.get("kind") == "infrastructure":
        stage.infrastructure_failures += 1
    else:
        stage.program_failures += 1


def _attempt_preempted(stage: StageState, event: Event) -> None:
    _attempt_over(stage, event)
    stage.preemptions += 1


def _attempt_interrupted(stage: StageState, event: Event) -> None:
    _attempt_over(stage, event)
    stage.interruptions += 1


def _stage_completed(stage: StageState, event: Event) -> None:
    stage.phase, stage.ended = "completed", True
    stage.completed_at, stage.result = event.get("time"), event.get("result")
    stage.stop_deadline = stage.retry_at = None
    stage.reason = stage.message = ""


def _gate(passed: bool):
    def handler(stage: StageState, event: Event) -> None:
        stage.gates[event.get("gate", 0)] = {
            "passed": passed,
            "metric": event.get("metric"),
            "value": event.get("value"),
            "handled": passed,
        }

    return handler


def _stage_tracking_started(stage: StageState, event: Event) -> None:
    stage.tracking_run = event.get("run_id")


_STAGE_EVENTS = {
    "handed_over": _handed_over,
    "stage_cleared": _stage_cleared,
    "stage_attempt_started": _attempt_started,
    "stage_attempt_launched": _attempt_launched,
    "stop_requested": _stop_requested,
    "checkpoint_saved": _checkpoint_saved,
    "stage_attempt_failed": _attempt_failed,
    "stage_attempt_preempted": _attempt_preempted,
    "stage_attempt_interrupted": _attempt_interrupted,
    "stage_completed": _stage_completed,
    "gate_passed": _gate(True),
    "gate_missed": _gate(False),
    "stage_tracking_started": _stage_tracking_started,
}
