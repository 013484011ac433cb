"""Iterations without rounds: what trains follows from the order and the rewards alone, however they were generated."""

from __future__ import annotations

import json

import pytest
from processes import run_ranks
from rl_stage import break_at, figures_of, prepare, rl_recipe, run, run_rank

from terrace.generation.native import NativeEngine
from terrace.rl.stream import Stream

SEAMLESS = {"rollout": "seamless", "max_response_tokens": 16}


class Killed(BaseException):
    """Stands for a process that ends at once."""


def killed() -> None:
    raise Killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seamless")
    prepare(folder, rl_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    run(rl_recipe(folder, 3, SEAMLESS), folder, "undisturbed")
    return figures_of(folder, "undisturbed")


def without_rounding(lines):
    """What does not come from how far apart two roundings are."""
    return [{key: value for key, value in line.items() if "mismatch" not in key} for line in lines]


def test_enough_groups_train_and_the_order_goes_on_after_the_last_of_them(folder, undisturbed):
    for line in undisturbed:
        assert line["groups_kept"] == 4
        assert line["groups_surplus"] == 0
        assert line["groups_drawn"] == 4 + line["groups_without_difference"]
        assert line["logprob_mismatch_max"] < 1e-4
    trace = json.loads((folder / "undisturbed" / "iteration-trace.json").read_text())
    assert trace["iteration"] == 3
    assert set(trace["lanes"]) == {"weights", "prompts", "decoding", "rewards", "training"}
    assert 0 <= trace["idle"] <= 1
    for spans in trace["lanes"].values():
        assert all(0 <= begin <= end <= trace["seconds"] + 0.01 and 0 <= share <= 1 for begin, end, share in spans)
    checkpoint = sorted((folder / "undisturbed" / "checkpoints").glob("step-*"))[-1]
    state = json.loads((checkpoint / "state.json").read_text())["data"]
    assert state["draws"] == sum(line["groups_drawn"] for line in undisturbed)


@pytest.mark.parametrize("where", ["rollout", "reward", "update"])
def test_broken_inside_an_iteration_it_goes_on_with_the_same_figures(folder, undisturbed, where):
    undo = break_at(where, 1, killed)
    try:
        with pytest.raises(Killed):
            run(rl_recipe(folder, 3, SEAMLESS), folder, f"broken-{where}")
    finally:
        undo()
    assert len(figures_of(folder, f"broken-{where}")) == 1
    run(rl_recipe(folder, 3, SEAMLESS), folder, f"broken-{where}")
    assert figures_of(folder, f"broken-{where}") == undisturbed


def test_how_many_decode_at_a_time_and_how_late_rewards_are_changes_nothing(folder, undisturbed, monkeypatch):
    few, open_engine = [], NativeEngine.__init__

    def narrow(self, *arguments, **keywords):
        open_engine(self, *arguments, **keywords, max_rows=12)
        few.append(self)

    taken, late = Stream.taken, []

    def later(self, tick, seconds=1.0):
        """In the order of their arrival turned round, and only once several are there."""
        late.extend(taken(self, tick, seconds))
        if len(late) < 3 and not self.over:
            return []
        found = late[::-1]
        late.clear()
        return found

    monkeypatch.setattr(NativeEngine, "__init__", narrow)
    monkeypatch.setattr(Stream, "taken", later)
    run(rl_recipe(folder, 3, SEAMLESS), folder, "narrow")
    assert few
    assert without_rounding(figures_of(folder, "narrow")) == without_rounding(undisturbed)


@pytest.mark.slow
def test_two_ranks_choose_what_one_chooses(folder, undisturbed):
    recipe = rl_recipe(folder, 3, SEAMLESS)
    run_ranks(2, run_rank, recipe.model_dump(mode="json"), str(folder), "two")
    for one, two in zip(undisturbed, figures_of(folder, "two"), strict=True):
        assert one["groups_drawn"] == two["groups_drawn"]
        assert one["reward"] == pytest.approx(two["reward"], abs=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
