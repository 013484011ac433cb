"""Mixtures of experts under objectives that compare answers: balanced and counted as under lm, whatever the packs and the ranks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import rl_stage
import torch
from families import CONFIGS
from processes import run_ranks
from rl_stage import figures_of, pair_recipe, rl_recipe, run, write_pairs, write_prompts

from terrace.data.prepare import prepare_data
from terrace.recipe.objectives import OBJECTIVES, ObjectiveEntry
from terrace.recipe.rules import check
from terrace.recipe.schema import Recipe

WEIGHT = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("balance")
    write_pairs(place)
    prepare_data(recipe_of(place), place, use_ray=False)
    return place


def recipe_of(folder: Path, family: str = "qwen3_vl_moe", **stage: Any) -> Recipe:
    values = pair_recipe(folder, steps=2, **{"objective": "dpo", "pixels": {"min": 4096, "max": 16384}, **stage}).model_dump(mode="json")
    return with_experts(values, family)


def with_experts(values: dict[str, Any], family: str) -> Recipe:
    config = copy.deepcopy(CONFIGS[family])
    dense = {"mlp_only_layers": [], "first_k_dense_replace": 0}  # experts in both layers
    config["text_config"] |= {field: value for field, value in dense.items() if field in config["text_config"]}
    values["model"] = {"architecture": family, "config": config}
    return Recipe.model_validate(values)


def lines_of(folder: Path, name: str, **stage: Any) -> list[dict[str, Any]]:
    result = run(recipe_of(folder, **stage), folder, name)
    assert result.evaluation["before"]["preference/loss"] > 0
    return [*figures_of(folder, name), result.evaluation["before"]]


def same(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert len(lines) == len(others)
    for line, other in zip(lines, others):
        for key in ("loss", "grad_norm", "expert_balance_loss"):
            assert line[key] == pytest.approx(other[key], rel=5e-5), key
        assert line["expert_tokens"] == other["expert_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "reward_model"])
def test_a_comparing_stage_balances_its_experts_over_the_global_batch(folder, objective):
    """Its loss is the comparison's plus weight times balance, which neither packs nor a held-out pass change."""

    def lines(name: str, length: int, weight: float) -> list[dict[str, Any]]:
        return lines_of(folder, f"{objective}-{name}", objective=objective, sequence_length=length, expert_balance=weight)

    *short, before = lines("short", 192, WEIGHT)
    *long, other = lines("long", 512, WEIGHT)
    *without, plain = lines("without", 192, 0.0)
    same(short, long)
    assert before == plain == pytest.approx(other, rel=1e-5)  # held-out losses are those of the comparison alone
    balanced(short[0], without[0], short[0]["tokens"])
    if objective == "dpo":
        assert without[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # of a policy that is still its reference


def balanced(first: dict[str, Any], bare: dict[str, Any], tokens: int) -> None:
    """The same step with the balance and without it."""
    assert "expert_balance_loss" not in bare
    assert first["expert_tokens"] == bare["expert_tokens"]
    assert first["loss"] == pytest.approx(bare["loss"] + WEIGHT * first["expert_balance_loss"], rel=1e-5)
    assert 1 / 8 <= first["expert_fullest_share"] <= 1
    assert sum(first["expert_tokens"]) == 2 * 2 * tokens  # two layers, two experts of each token


def policy_recipe(folder: Path, family: str, **stage: Any) -> Recipe:
    """One iteration of two groups in two updates, with a reference and without a clip."""
    options = {"prompts_per_iteration": 4, "updates_per_rollout": 2, "kl_coefficient": 0.1, "max_sampling_rounds": 1}
    values = rl_recipe(folder, 2, options, **{"pixels": {"min": 4096, "max": 16384}, **stage}).model_dump(mode="json")
    return with_experts(values, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "kimi_k25"])
def test_a_policy_balances_its_experts_over_the_global_batch(tmp_path, family):
    """Units of prompts and answers in one pack or in several, on one rank or on two: the same balance, beside the same policy loss."""
    write_prompts(tmp_path)
    prepare_data(policy_recipe(tmp_path, family), tmp_path, use_ray=False)
    runs = {"short": (192, WEIGHT), "long": (1024, WEIGHT), "without": (192, 0.0)}
    lines = {}
    for name, (length, weight) in runs.items():
        run(policy_recipe(tmp_path, family, sequence_length=length, expert_balance=weight), tmp_path, name)
        lines[name] = figures_of(tmp_path, name)
    same(lines["short"], lines["long"])
    balanced(lines["short"][0], lines["without"][0], sum(lines["short"][0]["expert_tokens"]) // 4)
    two = policy_recipe(tmp_path, family, sequence_length=192, expert_balance=WEIGHT, parallel={"strategy": "zero3"})
    run_ranks(2, run_each, {"two": two.model_dump(mode="json")}, str(tmp_path), timeout=800)
    same(figures_of(tmp_path, "two")[:1], lines["short"][:1])


def test_where_it_may_be_asked_for(monkeypatch):
    """Under every objective that comes with Terrace; one of the reader's own says whether it balances."""

    def told(**stage: Any) -> list[str]:
        return [str(problem) for problem in check(recipe_of(Path("x"), **stage)) if "expert_balance" in str(problem)]

    assert [told(expert_balance=0.1, objective=name) for name in ("dpo", "reward_model", "lm", "mtp", "medusa", "grpo")] == [[]] * 6
    monkeypatch.setitem(OBJECTIVES, "own", ObjectiveEntry("toy_objective", only_kind="preference"))
    assert "is part of the objectives lm, grpo, reward_model," in told(objective="own", expert_balance=0.1)[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "kimi_k25"])
def test_ranks_and_every_objective_balance_alike(tmp_path, family):
    """Two ranks with unequal packs equal one process; kto's second pass over other answers is not counted."""
    folder = tmp_path
    write_pairs(folder)
    prepare_data(recipe_of(folder, family), folder, use_ray=False)
    stage = {"family": family, "sequence_length": 256, "expert_balance": WEIGHT}
    names = ("kto", "mpo", "orpo", "simpo", "reward_model")
    one = {name: lines_of(folder, f"{family}-{name}-one", objective=name, **stage) for name in names}
    recipes = {
        f"{family}-{name}-{strategy}": recipe_of(folder, objective=name, parallel={"strategy": strategy}, **stage).model_dump(mode="json")
        for name, strategy in (("kto", "fsdp"), ("mpo", "zero3"), ("reward_model", "zero2"))
    }
    run_ranks(2, run_each, recipes, str(folder), timeout=800)
    for name, strategy in (("kto", "fsdp"), ("mpo", "zero3"), ("reward_model", "zero2")):
        same(figures_of(folder, f"{family}-{name}-{strategy}"), one[name][:-1])
    for name in ("kto", "mpo"):  # a reward model reads the last token of an answer, too
        assert one[name][0]["expert_tokens"] == one["simpo"][0]["expert_tokens"]


def run_each(rank: int, world_size: int, jobs: dict[str, Any], folder: str) -> None:
    for name, values in jobs.items():
        rl_stage.run_rank(rank, world_size, values, folder, name)
