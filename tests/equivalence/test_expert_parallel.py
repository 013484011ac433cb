"""Experts divided over ranks: the numbers of one process that holds all of them, a share of the memory, checkpoints that do not know."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from expert_ranks import count_each_family, train_each_family
from expert_steps import moe_case, train_experts
from families import CONFIGS
from packs import tiny_recipe
from processes import run_ranks

from terrace.errors import InputError
from terrace.models.build import meta_model, model_config
from terrace.models.expert_parallel import ExpertGroup, divide_experts, open_expert_group
from terrace.models.weights import Directory
from terrace.planner.experts import exchange_numbers, experts_elsewhere
from terrace.planner.shapes import shape_of_config
from terrace.recipe.schema import Model

FAMILIES = ["qwen3_vl_moe", "kimi_k25", "terrace_vlm"]
FOUR = [[0, 1], [2], [3], [4]]
AGAIN = {part: {"lr": 1e-3, "activation_checkpointing": True} for part in ("vision", "projector", "language")}
DROPPING = {"optimizer": {"clip": 0.05}}


def divided(ranks: int, **stage):
    return ("ddp", FOUR, {"parallel": {"strategy": "ddp", "experts": ranks}, **stage})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    directory = Directory(folder / "final")
    return {name: directory.read(name) for name in sorted(directory.names)}


def assert_same(lines, others, folder: Path, reference: Path, rtol: float = 1e-6) -> None:
    assert len(lines) == len(others)
    for line, other in zip(lines, others):
        for field in ("grad_norm", "expert_balance_loss"):
            if field in other:
                np.testing.assert_allclose(line[field], other[field], rtol=rtol, err_msg=field)
        found, expected = (one["loss"] if isinstance(one["loss"], dict) else {"": one["loss"]} for one in (line, other))  # per kind
        for kind in expected:
            np.testing.assert_allclose(found[kind], expected[kind], rtol=rtol, err_msg=kind)
        assert line.get("expert_tokens") == other.get("expert_tokens")
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) < 2e-5, name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_divided_experts_equal_one_process(tmp_path):
    """Of every family: two ranks, and four in two groups; recomputed blocks; a norm that clips; evaluations, balance of the batch."""
    torch.set_num_threads(1)
    runs = [("ddp", FOUR, {}), ("ddp", FOUR, {"train": AGAIN, **DROPPING})]
    alone = {name: train_experts(0, 1, name, runs, str(tmp_path / name)) for name in FAMILIES}
    for ranks, runs in ((2, [divided(2), divided(2, train=AGAIN, **DROPPING)]), (4, [divided(2), divided(4)])):
        together = run_ranks(ranks, train_each_family, FAMILIES, runs, str(tmp_path), timeout=800)[0]
        for name, found in together.items():
            for number, lines in enumerate(found):
                which = number if ranks == 2 else 0
                assert_same(lines, alone[name][which], tmp_path / name / f"{number}-{ranks}", tmp_path / name / f"{which}-1")


@pytest.mark.slow
def test_each_rank_holds_its_share_and_sends_what_the_plan_says(tmp_path):
    """Of weights, gradients and moments; its shards are all of them once; and the plan knows both."""
    torch.set_num_threads(1)
    ranks = run_ranks(4, count_each_family, FAMILIES, 2, str(tmp_path), timeout=500)
    for name in FAMILIES:
        found = [counts[name] for counts in ranks]
        whole = sum({key: numbers for counts in found for key, numbers in counts["wholes"].items()}.values())
        case = moe_case(name, tmp_path)
        recipe = tiny_recipe(model=case.section.model_dump(exclude_none=True), parallel={"strategy": "ddp", "experts": 2})
        stage, shape = recipe.stages[0], shape_of_config(case.config.to_dict(), case.config.model_type)
        assert experts_elsewhere(shape, stage) == whole // 2
        for counts in found:
            assert (counts["weights"], counts["gradients"], counts["moments"]) == (whole // 2,) * 3
            assert counts["shards"] == {"weights": whole // 4, "exp_avg": whole // 4}
        forward = sum(exchange_numbers(shape, stage, counts["tokens"]) for counts in found)
        assert sum(counts["sent"] for counts in found) == 2 * forward * 2  # backward as well; with those that stay at home


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_goes_on_with_another_division(tmp_path):
    """Saved by two ranks with divided experts after one of two steps; killed and resumed by them bit for bit, and by others."""
    torch.set_num_threads(1)
    name, saving = "qwen3_vl_moe", {"checkpoint": {"every_steps": 1, "keep_last": 9}}
    ways = {
        (2, 0): ("ddp", 2), (4, 0): ("ddp", 4), (1, 0): ("ddp", 1), (2, 1): ("fsdp", 1), (4, 1): ("ddp", 2),
    }  # fmt: skip
    runs = [("ddp", FOUR, {"parallel": {"strategy": "ddp", "experts": 2}, **saving})]
    [first] = run_ranks(2, train_experts, name, runs, str(tmp_path / "first"), timeout=400)[0]
    for ranks in (1, 2, 4):
        for place in range(1 + (ranks > 1)):
            folder = shutil.copytree(tmp_path / "first" / "0-2", tmp_path / "then" / f"{place}-{ranks}")
            shutil.rmtree(folder / "final")
            for checkpoint in (folder / "checkpoints").glob("step-*2"):
                shutil.rmtree(checkpoint)
        then = [
            (strategy, FOUR, {"parallel": {"strategy": strategy, "experts": experts}, **saving})
            for (count, _), (strategy, experts) in ways.items() if count == ranks
        ]  # fmt: skip
        if ranks == 1:
            found = train_experts(0, 1, name, then, str(tmp_path / "then"))
        else:
            found = run_ranks(ranks, train_experts, name, then, str(tmp_path / "then"), timeout=400)[0]
        for place, lines in enumerate(found):
            steps = [line for line in lines if "step_seconds" in line]
            assert [line["step"] for line in steps] == [2]
            same = (ranks, place) == (2, 0)
            expected = [line for line in first if line.get("step") == 2]
            assert_same(steps, expected, tmp_path / "then" / f"{place}-{ranks}", tmp_path / "first" / "0-2", 0 if same else 2e-6)
            if same:
                ours, theirs = weights(tmp_path / "then" / "0-2"), weights(tmp_path / "first" / "0-2")
                assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_cannot_be_divided_is_refused():
    case = CONFIGS["qwen2_5_vl"]
    group = ExpertGroup(None, 0, 3, None, 0, 1)
    dense = Model.model_validate({"architecture": "qwen2_5_vl", "config": case})
    with pytest.raises(InputError, match=r"parallel\.experts: this model has no experts"):
        divide_experts(meta_model(model_config(dense)), group)
    sparse = Model.model_validate({"architecture": "qwen3_vl_moe", "config": CONFIGS["qwen3_vl_moe"]})
    with pytest.raises(InputError, match=r"parallel\.experts 3 does not divide the 8 experts of model\.language_model\.layers\.1\.mlp"):
        divide_experts(meta_model(model_config(sparse)), group)
    with pytest.raises(InputError, match=r"5 workers do not form groups of parallel\.experts 2"):
        open_expert_group(2, 0, 5)
