"""Optimizers, the average of weights and the noise scale: resumed and spread alike, and what they say they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packs import tiny_recipe
from processes import run_ranks
from ranks import losses, stage_dir, train_each, train_stages
from safetensors.torch import load_file

from terrace.errors import Preempted
from terrace.planner.memory import optimizer_bytes
from terrace.planner.shapes import model_shape
from terrace.recipe.schema import Recipe
from terrace.train.step import noise_scale

KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, "plain": {"kind": "sgd"},
    "adafactor": {"kind": "adafactor"}, "muon": {"kind": "muon"}, "rising": {"weight_decay": 0.04, "final_weight_decay": 0.4},
    "lars": {"kind": "lars", "momentum": 0.9, "trust": 0.05, "weight_decay": 0.01},
}  # fmt: skip
AVERAGE = {"decay": 0.9, "export": True}
LARGE = {part: {"lr": 1e-2} for part in ("vision", "projector", "language")}


def values(kind: str, steps: int = 4, **stage: Any) -> dict[str, Any]:
    return tiny_recipe(
        optimizer=KINDS[kind], budget={"steps": steps}, train=LARGE, checkpoint={"every_steps": 1, "keep_last": 9}, ema=AVERAGE, **stage
    ).model_dump(mode="json")


def final(folder: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return load_file(stage_dir(folder, 0) / name / "model.safetensors")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind == "muon" else pytest.mark.slow) for kind in KINDS])
def test_an_optimizer_resumes_bit_for_bit_and_its_average_is_the_formula(kind, tmp_path):
    torch.set_num_threads(1)
    train_stages(0, 1, values(kind), str(tmp_path / "whole"))
    with pytest.raises(Preempted):
        train_stages(0, 1, values(kind), str(tmp_path / "cut"), stop_after=2)
    train_stages(0, 1, values(kind), str(tmp_path / "cut"))
    for name in ("final", "final-ema"):
        whole, cut = final(tmp_path / "whole", name), final(tmp_path / "cut", name)
        assert all(torch.equal(cut[key], tensor) for key, tensor in whole.items())
    steps = [
        load_file(stage_dir(tmp_path / "whole", 0) / "checkpoints" / f"step-{number:06d}" / "weights-00000.safetensors")
        for number in range(1, 5)
    ]
    [average] = (stage_dir(tmp_path / "whole", 0) / "checkpoints" / "step-000004").glob("average-*")
    kept = load_file(average)
    first = load_file(next((stage_dir(tmp_path / "whole", 0) / "checkpoints" / "step-000001").glob("average-*")))
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    expected = first[name]
    for weights in steps[1:]:
        expected = 0.9 * expected + 0.1 * weights[name]
    torch.testing.assert_close(kept[name], expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(kept[name], steps[-1][name])
    recipe = Recipe.model_validate(values(kind))
    planned = optimizer_bytes(model_shape(recipe), recipe.stages[0])
    files = [file for file in average.parent.glob("*.safetensors") if not file.name.startswith("weights")]
    held = sum(tensor.numel() * tensor.element_size() for file in files for tensor in load_file(file).values())
    assert planned == pytest.approx(held, rel=0.08)  # muon: patch embedding, norms and biases are adamw's


def test_sgd_with_momentum_is_its_formula(tmp_path):
    """v = 0.9 v + g, w = w - lr (g + 0.9 v) with Nesterov and decay in the gradient, from the weights of three checkpoints."""
    torch.set_num_threads(1)
    train_stages(0, 1, values("sgd", steps=3), str(tmp_path))
    folder, name = stage_dir(tmp_path, 0) / "checkpoints", "model.language_model.layers.0.mlp.up_proj.weight"

    def at(step: int, kind: str) -> torch.Tensor:
        return load_file(folder / f"step-{step:06d}" / f"{kind}-00000.safetensors")[name].double()

    momentum = [at(step, "momentum_buffer") for step in (1, 2, 3)]
    for step in (1, 2):
        gradient = momentum[step] - 0.9 * momentum[step - 1]
        moved = at(step, "weights") - 1e-2 * (gradient + 0.9 * momentum[step])
        torch.testing.assert_close(at(step + 1, "weights"), moved, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_strategy_that_takes_an_optimizer_gives_the_same_losses(tmp_path):
    torch.set_num_threads(1)
    offered = {"sgd": ("ddp", "fsdp", "zero1", "zero2", "zero3"), "plain": ("ddp", "fsdp", "zero2"), "adafactor": ("ddp",),
               "muon": ("ddp", "fsdp"), "lars": ("ddp", "fsdp"), "rising": ("ddp", "fsdp", "zero2", "zero3")}  # fmt: skip
    jobs = {}
    for kind, strategies in offered.items():
        train_stages(0, 1, values(kind), str(tmp_path / kind))
        for strategy in strategies:
            recipe = values(kind, parallel={"strategy": strategy})
            if strategy.startswith("zero"):
                recipe["stages"][0]["ema"] = None
            jobs[f"{kind}-{strategy}"] = recipe
    run_ranks(2, train_each, jobs, str(tmp_path), timeout=500)
    for name in jobs:
        kind = name.split("-")[0]
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / kind), rtol=2e-3 if kind == "muon" else 1e-5, err_msg=name)
        if (stage_dir(tmp_path / name, 0) / "final-ema").is_dir():
            here, there = final(tmp_path / name, "final-ema"), final(tmp_path / kind, "final-ema")
            for key, tensor in there.items():
                torch.testing.assert_close(here[key], tensor, rtol=1e-2, atol=2e-2 if kind == "muon" else 1e-5, msg=f"{name}: {key}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shared_matrices_resume_on_any_number_of_ranks(tmp_path):
    """Two ranks that share Muon's matrices, killed: on two the same bits, on one and four the same losses."""
    torch.set_num_threads(1)
    recipe = values("muon")
    run_ranks(2, train_stages, recipe, str(tmp_path / "whole"))
    with pytest.raises(AssertionError, match="Preempted"):
        run_ranks(2, train_stages, recipe, str(tmp_path / "cut"), 0, 2)
    for ranks in (2, 1, 4):
        folder = tmp_path / f"on-{ranks}"
        shutil.copytree(tmp_path / "cut", folder)
        if ranks == 1:
            train_stages(0, 1, recipe, str(folder))
        else:
            run_ranks(ranks, train_stages, recipe, str(folder))
        np.testing.assert_allclose(losses(folder), losses(tmp_path / "whole"), rtol=0 if ranks == 2 else 2e-3)
        last = stage_dir(folder, 0) / "checkpoints" / "step-000004"
        files = list(last.glob("momentum_buffer-*"))
        assert len(files) == ranks, "every rank wrote the momentum of its matrices"
        if ranks == 2:
            for name in ("final", "final-ema"):
                assert all(torch.equal(final(folder, name)[key], tensor) for key, tensor in final(tmp_path / "whole", name).items())


def test_the_noise_scale_is_that_of_known_gradients(tmp_path):
    """Gradients drawn around a known mean: the estimate over many steps is the trace over the square. And it stands in the metrics."""
    rng = np.random.default_rng(0)
    mean, spread, units = rng.normal(size=50), 3.0, 16
    parts = []
    for _ in range(400):
        drawn = mean + spread * rng.normal(size=(units, 50))
        small = [float((drawn[:4].mean(axis=0) ** 2).sum()), float((drawn[4:6].mean(axis=0) ** 2).sum())]
        parts.append(noise_scale(np.asarray(small), np.asarray([1 / 4, 1 / 2]), float((drawn.mean(axis=0) ** 2).sum()), units))
    trace = np.mean([part["gradient_noise_trace"] for part in parts])
    signal = np.mean([part["gradient_noise_signal"] for part in parts])
    assert trace == pytest.approx(50 * spread**2, rel=0.05)
    assert signal == pytest.approx((mean**2).sum(), rel=0.1)
    assert noise_scale(np.asarray([1.0]), np.asarray([1 / 8]), 1.0, 8) == {}
    torch.set_num_threads(1)
    recipe = tiny_recipe(gradient_noise=True, budget={"steps": 2}).model_dump(mode="json")
    train_stages(0, 1, recipe, str(tmp_path / "noise"))
    train_stages(0, 1, tiny_recipe(budget={"steps": 2}).model_dump(mode="json"), str(tmp_path / "plain"))
    assert losses(tmp_path / "noise") == losses(tmp_path / "plain"), "measuring changes nothing"
    lines = [json.loads(line) for line in (stage_dir(tmp_path / "noise", 0) / "metrics.jsonl").read_text().splitlines()]
    assert all(line["gradient_noise_trace"] > 0 for line in lines)
