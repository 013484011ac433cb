"""The state machine over stages, one rule per test; `test_random_worlds` holds all of them under random accidents."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from curriculum_world import World
from fakes import tiny_recipe

from terrace.cluster.attempt import AttemptObservation
from terrace.curriculum.actions import Clear, Finish, Launch, Observation, Prepare, Record, Stop, Wait
from terrace.curriculum.gates import metric_value
from terrace.curriculum.machine import backoff_seconds, step
from terrace.curriculum.state import fold
from terrace.recipe.schema import Recipe

NOW = 1000.0
RESULT = {"steps": 4, "loss": 0.5, "evaluation": {"before": {"caption": 2.0}, "after": {"caption": 1.5}}}


def started(*more: dict[str, Any]) -> list[dict[str, Any]]:
    first = {"event": "stage_attempt_started", "stage": "stage-a", "attempt": 1, "time": NOW}
    return [{"event": "run_started", "time": NOW}, {"event": "data_prepared"}, first, *more]


def seen(status: str, stage: str = "stage-a", attempt: int = 1, live: bool = False, **more: Any) -> Observation:
    observed = AttemptObservation(stage, attempt, status, live=live, **more)
    return Observation((observed,), ((stage, attempt),) if live else ())


def events_of(actions: list[Any]) -> list[str]:
    return [action.event["event"] for action in actions if isinstance(action, Record)]


def failed(kind: str, attempt: int = 1, **more: Any) -> dict[str, Any]:
    event = {"event": "stage_attempt_failed", "stage": "stage-a", "attempt": attempt, "kind": kind, "reason": "Test"}
    return {**event, "message": "told to", "time": NOW, "retry_at": NOW, **more}


def test_a_new_run_is_recorded_then_prepared_then_launched():
    recipe = tiny_recipe(2)
    assert events_of(step(recipe, [], Observation(), NOW)) == ["run_started"]
    assert step(recipe, [{"event": "run_started"}], Observation(), NOW) == [Prepare()]
    actions = step(recipe, started()[:2], Observation(), NOW)
    assert events_of(actions) == ["stage_attempt_started"]
    assert actions[-1] == Launch(0, "stage-a", 1)


def test_an_attempt_recorded_but_not_launched_is_launched_with_the_same_number():
    assert step(tiny_recipe(2), started(), Observation(), NOW) == [Launch(0, "stage-a", 1)]


def test_success_hands_the_weights_over_to_the_next_stage():
    recipe = tiny_recipe(2)
    assert events_of(step(recipe, started(), seen("succeeded", result=RESULT), NOW)) == ["stage_completed"]
    done = started({"event": "stage_completed", "stage": "stage-a", "attempt": 1, "result": RESULT})
    actions = step(recipe, done, Observation(), NOW)
    assert actions[0].event == {"event": "handed_over", "stage": "stage-b", "from": "stage-a"}
    assert actions[-1] == Launch(1, "stage-b", 1)


def test_the_next_stage_waits_until_the_processes_of_the_last_one_are_gone():
    """It has succeeded, and something of it still runs: the next stage would meet it on its GPUs."""
    (waiting,) = step(tiny_recipe(2), started(), seen("succeeded", live=True, result=RESULT), NOW)
    assert isinstance(waiting, Wait)
    assert "ending" in waiting.reason
    assert events_of(step(tiny_recipe(2), started(), seen("succeeded", live=False, result=RESULT), NOW)) == ["stage_completed"]


def test_no_attempt_starts_while_an_older_one_may_still_write():
    actions = step(tiny_recipe(1), started(failed("program")), Observation(live=(("stage-a", 1),)), NOW + 10)
    assert actions == [Stop(0, "stage-a", 1, "the attempt is over", force=True), actions[1]]
    assert isinstance(actions[1], Wait)


@pytest.mark.parametrize(
    ("kind", "budget", "reason"),
    [("program", 2, "ProgramFailuresSpent"), ("infrastructure", 20, "InfrastructureFailuresSpent")],
)
def test_each_kind_of_failure_has_its_own_budget(kind: str, budget: int, reason: str):
    recipe, history = tiny_recipe(1), started()[:2]
    for attempt in range(1, budget + 2):
        history += [{"event": "stage_attempt_started", "stage": "stage-a", "attempt": attempt}, failed(kind, attempt)]
        actions = step(recipe, history, Observation(), NOW + 1e4)
        if attempt <= budget:
            assert isinstance(actions[-1], Launch)
    assert actions[0].event["event"] == "run_failed"
    assert actions[0].event["reason"] == reason
    assert str(budget) in actions[0].event["message"]
    other = "infrastructure" if kind == "program" else "program"
    mixed = [{**event, "kind": other} if event["event"] == "stage_attempt_failed" and event["attempt"] == 1 else event for event in history]
    assert isinstance(step(recipe, mixed, Observation(), NOW + 1e4)[-1], Launch), "the other kind has a budget of its own"


def test_preemptions_and_interruptions_spend_no_budget_and_wait_for_nothing():
    history = started()[:2]
    for attempt in range(1, 60):
        kind = "stage_attempt_preempted" if attempt % 2 else "stage_attempt_interrupted"
        history += [
            {"event": "stage_attempt_started", "stage": "stage-a", "attempt": attempt},
            {"event": kind, "stage": "stage-a", "attempt": attempt, "retry_at": NOW},
        ]
    assert isinstance(step(tiny_recipe(1), history, Observation(), NOW)[-1], Launch)


def test_wrong_input_is_not_tried_again():
    actions = step(tiny_recipe(1), started(), seen("failed", failure="input", message="no such file"), NOW)
    assert actions[0].event["retry_at"] is None
    after = started(actions[0].event)
    failure = step(tiny_recipe(1), after, Observation(), NOW)[0].event
    assert (failure["event"], failure["reason"]) == ("run_failed", "InputWrong")
    assert step(tiny_recipe(1), [*after, failure], Observation(), NOW) == [Finish("failed", 2, failure["message"])]


def test_backoff_doubles_up_to_its_cap_and_is_waited_for():
    failure = tiny_recipe(1, failure={"backoff_seconds": 10, "backoff_cap_seconds": 60}).stages[0].failure
    assert [backoff_seconds(failure, count) for count in (1, 2, 3, 4, 5, 5000)] == [10, 20, 40, 60, 60, 60]
    recipe = tiny_recipe(1, failure={"backoff_seconds": 10, "backoff_cap_seconds": 60})
    event = step(recipe, started(), seen("failed", failure="program"), NOW)[0].event
    assert event["retry_at"] == NOW + 10
    assert step(recipe, started(event), Observation(), NOW + 9) == [Wait(NOW + 10, "stage stage-a is tried again after ProgramFailed")]
    assert isinstance(step(recipe, started(event), Observation(), NOW + 10)[-1], Launch)
    assert isinstance(step(recipe, started(event), Observation(), NOW - 86400)[-1], Launch), "a clock that jumped back is not waited for"


def test_no_progress_is_an_infrastructure_failure():
    recipe = tiny_recipe(1, failure={"stall_timeout_seconds": 100})
    history = started({"event": "stage_attempt_launched", "stage": "stage-a", "attempt": 1})
    fresh = seen("running", live=True, progress_at=NOW + 500)
    assert isinstance(step(recipe, history, fresh, NOW + 599)[-1], Wait)
    actions = step(recipe, history, fresh, NOW + 601)
    assert (actions[0].event["kind"], actions[0].event["reason"]) == ("infrastructure", "Stalled")
    assert actions[1].force
    before_first_step = seen("running", live=True)
    assert isinstance(step(recipe, history, before_first_step, NOW + 99)[-1], Wait)
    assert events_of(step(recipe, history, before_first_step, NOW + 101)) == ["stage_attempt_failed"]


def test_an_attempt_that_vanished_counts_as_lost():
    history = started({"event": "stage_attempt_launched", "stage": "stage-a", "attempt": 1})
    assert step(tiny_recipe(1), history, Observation(), NOW)[0].event["reason"] == "AttemptLost"


def test_a_late_report_of_an_older_attempt_changes_nothing():
    second = {"event": "stage_attempt_started", "stage": "stage-a", "attempt": 2}
    history = started(failed("program"), second)
    late = {"event": "stage_completed", "stage": "stage-a", "attempt": 1, "result": RESULT}
    assert fold(["stage-a"], [*history, late]).stages[0] == fold(["stage-a"], history).stages[0]


@pytest.mark.parametrize(("on_miss", "phase", "status"), [("pause", "paused", 1), ("fail", "failed", 1), ("continue", None, None)])
def test_gates(on_miss: str, phase: str | None, status: int | None):
    recipe = tiny_recipe(2, gates=[{"metric": "eval/caption/loss", "below": 1.0, "on_miss": on_miss}])
    history = started({"event": "stage_completed", "stage": "stage-a", "attempt": 1, "result": RESULT})
    missed = step(recipe, history, Observation(), NOW)
    assert events_of(missed) == ["gate_missed"]
    history.append(missed[0].event)
    actions = step(recipe, history, Observation(), NOW)
    if phase is None:
        assert isinstance(actions[-1], Launch)
        return
    history.append(actions[0].event)
    finish = step(recipe, history, Observation(), NOW)[0]
    assert (finish.phase, finish.exit_status) == (phase, status)
    assert "eval/caption/loss" in finish.message
    resumed = step(recipe, [*history, {"event": "resume_requested"}], Observation(), NOW)
    assert resumed[-1] == Launch(1, "stage-b", 1), "resuming accepts the gate"


def test_a_gate_on_a_metric_that_was_not_measured_is_missed():
    recipe = tiny_recipe(1, gates=[{"metric": "train/grad_norm", "below": 1.0, "on_miss": "fail"}])
    history = started({"event": "stage_completed", "stage": "stage-a", "attempt": 1, "result": RESULT})
    event = step(recipe, history, Observation(), NOW)[0].event
    assert (event["event"], event["value"]) == ("gate_missed", None)
    assert metric_value({"loss": float("nan")}, "train/loss") is None
    assert metric_value(RESULT, "eval/caption/loss") == 1.5
    assert metric_value(RESULT, "eval/loss") == 1.5
    assert metric_value({**RESULT, "train": {"grad_norm": 3.0}}, "train/grad_norm") == 3.0
    assert metric_value({**RESULT, "suites": {"mmbench": {"accuracy": 0.5}}}, "eval/mmbench/accuracy") == 0.5


def test_pause_finishes_the_stage_and_starts_no_other():
    recipe, asked = tiny_recipe(2), {"event": "pause_requested"}
    launched = {"event": "stage_attempt_launched", "stage": "stage-a", "attempt": 1}
    assert isinstance(step(recipe, started(launched, asked), seen("running", live=True), NOW)[0], Wait)
    done = {"event": "stage_completed", "stage": "stage-a", "attempt": 1, "result": RESULT}
    actions = step(recipe, started(asked, done), Observation(), NOW)
    assert events_of(actions) == ["paused"]
    paused = started(asked, done, actions[0].event)
    assert step(recipe, paused, Observation(), NOW)[0].exit_status == 143
    assert isinstance(step(recipe, [*paused, {"event": "resume_requested"}], Observation(), NOW)[-1], Launch)


@pytest.mark.parametrize(("request_name", "phase", "status"), [("suspend", "suspended", 143), ("cancel", "cancelled", 1)])
def test_suspend_and_cancel_ask_for_a_checkpoint_then_force(request_name: str, phase: str, status: int):
    recipe = tiny_recipe(2, failure={"preemption_grace_seconds": 30})
    history = started({"event": "stage_attempt_launched", "stage": "stage-a", "attempt": 1}, {"event": f"{request_name}_requested"})
    running = seen("running", live=True, progress_at=NOW)
    actions = step(recipe, history, running, NOW)
    assert actions == [actions[0], Stop(0, "stage-a", 1, request_name)]
    history.append({**actions[0].event, "time": NOW})
    assert not step(recipe, history, running, NOW + 29)[0].force
    assert step(recipe, history, running, NOW + 31)[0].force
    ended = step(recipe, history, seen("failed", failure="infrastructure"), NOW + 32)[0].event
    assert ended["event"] == "stage_attempt_preempted", "what ended after it was told to stop is no failure"
    history.append(ended)
    history.append(step(recipe, history, Observation(), NOW + 33)[0].event)
    assert step(recipe, history, Observation(), NOW + 34) == [Finish(phase, status, f"{phase} on request")]


def test_a_signal_to_the_controller_checkpoints_and_leaves_the_run_going():
    recipe = tiny_recipe(1)
    history = started({"event": "stage_attempt_launched", "stage": "stage-a", "attempt": 1})
    observation = Observation(seen("running", live=True).attempts, (("stage-a", 1),), interrupted=True)
    actions = step(recipe, history, observation, NOW)
    assert (events_of(actions), actions[-1]) == (["stop_requested"], Stop(0, "stage-a", 1, "interrupted"))
    after = [*history, actions[0].event, {"event": "stage_attempt_preempted", "stage": "stage-a", "attempt": 1, "retry_at": NOW}]
    assert step(recipe, after, Observation(interrupted=True), NOW)[0].exit_status == 143
    assert isinstance(step(recipe, after, Observation(), NOW)[-1], Launch)


@pytest.mark.parametrize("ending", ["run_completed", "run_failed", "cancelled"])
def test_a_terminal_run_never_starts_anything_by_itself(ending: str):
    history = started(failed("program"), {"event": ending, "reason": "Test", "message": "over"})
    assert isinstance(step(tiny_recipe(2), history, Observation(), NOW + 1e6)[0], Finish)
    for request in ("pause_requested", "suspend_requested", "cancel_requested", "data_prepared", "controller_started"):
        assert isinstance(step(tiny_recipe(2), [*history, {"event": request}], Observation(), NOW + 1e6)[0], Finish)
    resumed = step(tiny_recipe(2), [*history, {"event": "resume_requested"}], Observation(), NOW + 1e6)
    assert isinstance(resumed[-1], Launch) == (ending == "run_failed")


def test_a_rerun_clears_the_stage_and_those_after_it_and_keeps_counting_attempts():
    recipe = tiny_recipe(3)
    history = started({"event": "stage_completed", "stage": "stage-a", "attempt": 1, "result": RESULT})
    history += [
        {"event": "handed_over", "stage": "stage-b", "from": "stage-a"},
        {"event": "stage_attempt_started", "stage": "stage-b", "attempt": 1},
        {"event": "stage_completed", "stage": "stage-b", "attempt": 1, "result": RESULT},
        {"event": "rerun_requested", "stage": "stage-b"},
    ]
    actions = step(recipe, history, Observation(), NOW)
    assert actions[0] == Clear(1, "stage-b", 1)
    history.append(actions[1].event)
    assert step(recipe, history, Observation(), NOW)[-1] == Launch(1, "stage-b", 2)


def test_a_stage_may_start_from_a_stage_it_names():
    recipe = tiny_recipe(3)
    stages = [*recipe.stages[:2], recipe.stages[2].model_copy(update={"start_from": "stage-a"})]
    recipe = recipe.model_copy(update={"stages": stages})
    history = started({"event": "stage_completed", "stage": "stage-a", "attempt": 1, "result": RESULT})
    history += [
        {"event": "stage_attempt_started", "stage": "stage-b", "attempt": 1},
        {"event": "stage_completed", "stage": "stage-b", "attempt": 1, "result": RESULT},
    ]
    assert step(recipe, history, Observation(), NOW)[0].event["from"] == "stage-a"


CHAOTIC = {"max_restarts": 2, "max_infrastructure_restarts": 4, "stall_timeout_seconds": 60, "backoff_seconds": 1,
           "backoff_cap_seconds": 8, "preemption_grace_seconds": 10}  # fmt: skip


def run_world(recipe: Recipe, seed: int, chaos: float, loses: bool, width: int = 1) -> World:
    """A run under accidents and then in peace, to its end: budgets kept, nothing stuck."""
    world = World(recipe, seed, chaos, width, loses)
    for _ in range(150):
        world.tick()
    finish = world.settle()
    state = fold(world.names, world.events)
    assert finish.phase == state.phase
    for stage in state.stages:
        assert stage.program_failures <= CHAOTIC["max_restarts"] + 1
        assert stage.infrastructure_failures <= CHAOTIC["max_infrastructure_restarts"] + 1
    if state.phase == "succeeded":
        assert all(stage.phase == "completed" for stage in state.stages)
    if state.phase == "failed":
        assert state.reason in ("ProgramFailuresSpent", "InfrastructureFailuresSpent")
        assert not state.attempts_in_flight
    return world


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), loses=st.booleans(), chaos=st.sampled_from([0.05, 0.3, 0.8]))
def test_random_worlds(seed: int, loses: bool, chaos: float):
    """No two live attempts, no stage out of order or run again after success, budgets kept, and always an end."""
    run_world(tiny_recipe(4, failure=CHAOTIC), seed, chaos, loses)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([
    "run_started", "data_prepared", "stage_attempt_started", "stage_attempt_launched", "stage_attempt_failed",
    "stage_completed", "paused", "pause_requested", "resume_requested", "rerun_requested", "suspend_requested",
    "cancel_requested", "cancelled", "run_failed", "gate_missed", "from_the_future",
]), max_size=30), st.integers(0, 3))  # fmt: skip
def test_any_stream_of_events_gives_a_state_and_an_action(kinds: list[str], salt: int):
    """Journals of other versions, torn and merged ones: never an exception, always something to do."""
    recipe = tiny_recipe(2)
    events = [{"event": kind, "stage": "ab"[(number + salt) % 2] and f"stage-{'ab'[(number + salt) % 2]}", "attempt": number // 4 + 1,
               "time": NOW + number, "kind": "program", "gate": 0} for number, kind in enumerate(kinds)]  # fmt: skip
    assert step(recipe, events, Observation(), NOW + 100)
