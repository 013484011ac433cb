"""Stages as a graph: branches side by side where there is room, with the guarantees of a sequence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fakes import tiny_recipe
from test_curriculum_machine import CHAOTIC, NOW, RESULT, events_of, run_world

from terrace.cluster.attempt import AttemptObservation
from terrace.curriculum.actions import Finish, Launch, Observation, Record, Stop, Wait
from terrace.curriculum.graph import waits_for, with_dependents
from terrace.curriculum.machine import next_actions
from terrace.curriculum.state import RunState, apply, fold
from terrace.recipe import rules
from terrace.recipe.identity import stage_hash
from terrace.recipe.schema import Gate, Recipe


def graph(letters: str = "abcd", order: str = "graph", **changes: dict[str, Any]) -> Recipe:
    """a; b and c start from a; d starts from b and waits for c too. `changes`: of stages, by letter."""
    recipe = tiny_recipe(len(letters), failure=CHAOTIC)
    given = {"b": {"start_from": "stage-a"}, "c": {"start_from": "stage-a"}, "d": {"start_from": "stage-b", "after": ["stage-c"]}}
    keys = {letter: given.get(letter, {}) | changes.get(letter, {}) for letter in letters}
    stages = [stage.model_copy(update=keys[letter]) for stage, letter in zip(recipe.stages, letters, strict=True)]
    return recipe.model_copy(update={"stages": stages, "stage_order": order})


class Run:
    """The machine's answers carried out, with attempts that do what the test says."""

    def __init__(self, recipe: Recipe, width: int = 8) -> None:
        self.recipe, self.width, self.state = recipe, width, RunState(fold([s.name for s in recipe.stages], []).stages)
        self.seen: dict[str, AttemptObservation] = {}
        self.asked: dict[str, str] = {}

    def turn(self) -> list[Any]:
        live = tuple((seen.stage, seen.attempt) for seen in self.seen.values() if seen.live)
        actions = next_actions(self.recipe, self.state, Observation(tuple(self.seen.values()), live), NOW, self.width)
        for action in actions:
            match action:
                case Record(event):
                    apply(self.state, {"time": NOW, **event})
                case Launch(_, stage, attempt):
                    self.seen[stage] = AttemptObservation(stage, attempt, "running", live=True, progress_at=NOW)
                case Stop(_, stage, _, reason, _):
                    self.asked[stage] = reason
        if any(type(action).__name__ == "Prepare" for action in actions):
            apply(self.state, {"event": "data_prepared"})
        return actions

    def rest(self) -> list[Any]:
        """Turn until it waits or finishes."""
        for _ in range(40):
            actions = self.turn()
            if all(isinstance(action, Wait | Finish | Stop) for action in actions):
                return actions
        raise AssertionError(f"it does not come to rest: {actions}")

    def end(self, letter: str, status: str = "succeeded", **values: Any) -> list[Any]:
        stage = self.state.stage(f"stage-{letter}")
        result = RESULT if status == "succeeded" else None
        self.seen[stage.name] = AttemptObservation(stage.name, stage.attempt, status, result=result, **values)
        return self.rest()

    def running(self) -> str:
        return "".join(stage.name[-1] for stage in self.state.attempts_in_flight)


def test_branches_run_side_by_side_and_what_waits_for_both_comes_after_both():
    run = Run(graph())
    run.rest()
    assert run.running() == "a"  # all others wait for it
    run.end("a")
    assert run.running() == "bc"
    run.end("c")
    assert run.running() == "b"
    run.end("b")
    assert run.running() == "d"
    assert run.state.stage("stage-d").starts_from == "stage-b"
    assert run.end("d") == [Finish("succeeded", 0, "all stages are complete")]


def test_without_room_or_without_a_graph_one_runs_at_a_time_in_the_written_order():
    for recipe, width in ((graph(), 1), (graph(order="sequence", d={"after": []}), 8)):
        run, order = Run(recipe, width), ""
        run.rest()
        for _ in "abcd":
            assert len(run.running()) == 1
            order += run.running()
            run.end(run.running())
        assert (order, run.state.phase) == ("abcd", "succeeded")


def test_a_branch_that_fails_for_good_stops_the_others_with_a_checkpoint_first():
    run = Run(graph())
    run.rest()
    run.end("a")
    run.end("b", "failed", failure="input", message="the data is wrong")
    assert (run.asked, run.running(), run.state.phase) == ({"stage-c": "failed"}, "c", "running")
    actions = run.end("c", "preempted")
    assert (run.state.phase, run.state.reason) == ("failed", "InputWrong")
    assert actions[-1].exit_status == 2
    apply(run.state, {"event": "resume_requested"})
    run.rest()
    assert run.running() == "bc"
    assert (run.state.stage("stage-c").preemptions, run.state.stage("stage-c").program_failures) == (1, 0)


def test_a_branch_that_waits_for_its_next_try_holds_nobody_up():
    run = Run(graph())
    run.rest()
    run.end("a")
    run.end("b", "failed", failure="program")
    assert (run.running(), run.state.stage("stage-b").phase) == ("c", "waiting")
    run.end("c")
    assert run.state.phase == "running"
    assert isinstance(run.turn()[-1], Wait)


@pytest.mark.parametrize("on_miss", ["pause", "fail"])
def test_a_missed_gate_lets_nothing_new_start_and_what_runs_end_well(on_miss: str):
    gate = {"gates": [Gate(metric="eval/loss", below=0.1, on_miss=on_miss)]}
    run = Run(graph("abcd", c=gate, d={"start_from": "stage-b", "after": []}))
    run.rest()
    run.end("a")
    run.end("c")
    assert (run.running(), run.asked) == ("b", {"stage-b": "failed"} if on_miss == "fail" else {})
    run.end("b", "preempted" if on_miss == "fail" else "succeeded")
    assert (run.state.phase, run.state.reason, run.running()) == ("failed" if on_miss == "fail" else "paused", "GateMissed", "")
    apply(run.state, {"event": "resume_requested"})
    run.rest()
    assert run.running() == ("b" if on_miss == "fail" else "d")


@pytest.mark.parametrize("wish", ["pause", "suspend", "cancel"])
def test_a_wish_holds_for_all_branches(wish: str):
    run = Run(graph())
    run.rest()
    run.end("a")
    apply(run.state, {"event": f"{wish}_requested"})
    run.rest()
    assert set(run.asked) == (set() if wish == "pause" else {"stage-b", "stage-c"})
    for letter in "bc":
        run.end(letter, "succeeded" if wish == "pause" else "preempted")
    assert (run.state.phase, run.running()) == ({"pause": "paused", "suspend": "suspended", "cancel": "cancelled"}[wish], "")


def test_an_attempt_of_a_branch_waits_for_the_end_of_its_own_older_one():
    run = Run(graph())
    run.rest()
    run.end("a")
    run.end("b", "preempted", live=True)  # over, and something of it still runs
    assert run.running() == "c"
    run.end("b", "preempted")
    assert (run.running(), run.state.stage("stage-b").attempt) == ("bc", 2)


def test_a_rerun_takes_the_branch_and_leaves_the_other():
    recipe = graph()
    assert with_dependents(recipe, "stage-c") == ["stage-c", "stage-d"]
    assert with_dependents(recipe.model_copy(update={"stage_order": "sequence"}), "stage-b") == ["stage-b", "stage-c", "stage-d"]
    run = Run(recipe)
    run.rest()
    for letter in "abcd":
        run.end(letter)
    apply(run.state, {"event": "rerun_requested", "stage": "stage-c", "stages": with_dependents(recipe, "stage-c")})
    assert [stage.phase for stage in run.state.stages] == ["completed", "completed", "pending", "pending"]
    assert "stage_cleared" in events_of(run.turn())


def test_what_a_stage_may_wait_for():
    recipe = graph()
    assert [sorted(name[-1] for name in waits_for(recipe, index)) for index in range(4)] == [[], ["a"], ["a"], ["b", "c"]]
    problems = [str(problem) for problem in rules.check(graph(b={"after": ["stage-d"]}, c={"after": ["stage-x"]}))]
    assert any("stage `stage-d` does not stand before `stage-b`" in problem for problem in problems)
    assert any("there is no stage `stage-x`" in problem for problem in problems)
    assert any("only has a meaning with `stage_order: graph`" in str(problem) for problem in rules.check(graph(order="sequence")))
    assert stage_hash(recipe, 3) == stage_hash(graph(d={"after": []}), 3)  # when it runs changes nothing of what it computes


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), loses=st.booleans(), chaos=st.sampled_from([0.05, 0.3, 0.8]), width=st.sampled_from([1, 2, 8]))
def test_random_worlds_of_a_graph(seed: int, loses: bool, chaos: float, width: int):
    world = run_world(graph("abcd"), seed, chaos, loses, width)
    assert world.widest <= min(width, 2)
