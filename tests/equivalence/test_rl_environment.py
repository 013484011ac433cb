"""A grpo stage whose prompts are conversations with an environment, beside a task of one answer: exact where the others are."""

from __future__ import annotations

import json

import pytest
import rl_stage
from processes import run_ranks
from rl_stage import break_at, figures_of, prepare, rl_recipe
from rl_stage import run_stopping as run

from terrace.errors import InputError
from terrace.recipe.schema import Recipe
from terrace.rl.collect import RewardFailures

OPTIONS = {"prompts_per_iteration": 4, "samples_per_prompt": 4, "max_response_tokens": 6, "max_sampling_rounds": 1}
TALK = {"digits": {"name": "rl_rules:more_digits", "turns": 3, "max_observation_tokens": 64}}
CAPITALS = {"capitals": [{"name": "rl_rules:share_of_capitals"}]}


class Killed(BaseException):
    """Stands for a process that ends at once."""


def killed() -> None:
    raise Killed


def recipe_of(folder, steps=2, rewards=None, environment=None, **changes) -> Recipe:
    changes = {"evaluate": {"max_samples_per_kind": 2}, **changes}
    return rl_recipe(folder, steps, OPTIONS, rewards=rewards or CAPITALS, environment=environment or TALK, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    prepare(folder, rl_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    run(recipe_of(folder), folder, "undisturbed")
    return figures_of(folder, "undisturbed")


def test_a_stage_of_conversations(folder, undisturbed):
    assert [line["step"] for line in undisturbed] == [1, 2]
    for line in undisturbed:
        assert line["logprob_mismatch_max"] < 1e-4
        assert line["logprobs_compared"] == 1.0
        assert 1 <= line["tasks"]["digits"]["turns"] <= 3
        assert "turns" not in line["tasks"]["capitals"]
        assert line["tasks"]["digits"]["reward_failures"] == 0
        assert 0 < line["supervised_tokens"] <= 16 * 3 * OPTIONS["max_response_tokens"]
    kept = json.loads((folder / "undisturbed" / "calibration.json").read_text())
    talked = [one for one in kept["shown"]["digits"] if one["seen"]]
    assert talked
    assert all(kept["pictures"][one["seen"]] and "more digits" in one["response"] for one in talked)
    assert "reward/digits" in (folder / "undisturbed" / "result.json").read_text()


@pytest.mark.parametrize("where", ["rollout", pytest.param("reward", marks=pytest.mark.slow), "update"])
def test_broken_inside_an_iteration_it_goes_on_with_the_same_figures(folder, undisturbed, where):
    undo = break_at(where, 1, killed, call=1 if where == "update" else 2)  # an update may be one pack
    try:
        with pytest.raises(Killed):
            run(recipe_of(folder), folder, f"broken-{where}")
    finally:
        undo()
    run(recipe_of(folder), folder, f"broken-{where}")
    assert figures_of(folder, f"broken-{where}") == undisturbed


@pytest.mark.slow
def test_two_ranks_have_the_figures_of_one(folder, undisturbed):
    recipe = recipe_of(folder, parallel={"strategy": "ddp"})
    run_ranks(2, rl_stage.run_stopping, recipe.model_dump(mode="json"), str(folder), "ranks")
    for one, two in zip(undisturbed, figures_of(folder, "ranks"), strict=True):
        for key in ("loss", "grad_norm", "supervised_tokens", "samples", "groups_kept", "reward"):
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-3), key
        for task in ("digits", "capitals"):
            for figure in ("turns", "distinct", "response_tokens", "truncated", "reward_failures"):
                assert one["tasks"][task].get(figure) == pytest.approx(two["tasks"][task].get(figure)), (task, figure)
    # What a report shows comes from the rank that sampled it, pictures too.
    for file in ("calibration.json", "examples.jsonl"):
        assert (folder / "ranks" / file).read_text() == (folder / "undisturbed" / file).read_text(), file


def test_what_does_not_fit_is_said_before_a_step(folder):
    both = {**CAPITALS, "digits": [{"name": "rl_rules:share_of_digits"}]}
    with pytest.raises(RewardFailures, match=r"it pays, and `rewards` of task digits does too"):
        run(recipe_of(folder, rewards=both, evaluate={"max_samples_per_kind": 1}), folder, "both")
    wrong = {"digits": {"name": "rl_rules:wrong_environment", "options": {"how": "reward"}}}
    with pytest.raises(InputError, match=r"(?s)cannot be judged; no step was made.*its reward '1.5' is no number in \[0, 1\]"):
        run(recipe_of(folder, environment=wrong, sequence_length=2304), folder, "wrong")
    nowhere = {"digits": {**TALK["digits"], "name": "nowhere:at_all"}}
    with pytest.raises(InputError, match="cannot import nowhere:at_all"):
        run(recipe_of(folder, environment=nowhere), folder, "nowhere")
