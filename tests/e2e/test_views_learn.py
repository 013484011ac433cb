"""Encoders of pictures learn without a label: their features tell the direction of hatching, where those of random weights do not.

Pictures are drawn: hatched in one of six directions, with any spacing, place and two colours, shapes before it, noise over all. Nothing but
the direction tells the classes apart, and no pixel's value does.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import prepare_data
from terrace.evaluate.run import Settings, evaluate_model
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.recipe.rules import check
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

DIRECTIONS, SIDE, TRAINED, ASKED = 6, 32, 1_600, 600
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8}
COLOURS = {"jitter": 1.0, "saturation": 0.4, "hue": 0.3, "flip": 0.0, "blur": 0.0}  # a mirrored hatching has another direction
WHOLE = {"count": 2, "area": [0.4, 1.0], **COLOURS}
HEAD = {"hidden_width": 128, "output_width": 64}


def hatched(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """uint8 [SIDE, SIDE, 3] and the number of its direction."""
    direction = int(rng.integers(DIRECTIONS))
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    angle, spacing = math.pi * (direction + rng.uniform(-0.25, 0.25)) / DIRECTIONS, rng.uniform(4, 9)
    wave = np.sin(2 * math.pi * ((x * math.cos(angle) + y * math.sin(angle)) / spacing + rng.uniform()))
    first, second = rng.uniform(0, 255, (2, 3))
    while np.abs(first - second).sum() < 150:
        first, second = rng.uniform(0, 255, (2, 3))
    pixels = first + (second - first) / (1 + np.exp(-4 * wave))[..., None]
    for _ in range(int(rng.integers(1, 4))):
        radius, (left, top), colour = rng.uniform(3, 6), rng.uniform(0, SIDE, 2), rng.uniform(0, 255, 3)
        round_one = (x - left) ** 2 + (y - top) ** 2 < radius**2
        square = (abs(x - left) < 0.9 * radius) & (abs(y - top) < 0.9 * radius)
        pixels[round_one if rng.random() < 0.5 else square] = colour
    return (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8), direction


def write_hatched(folder: Path, grey: bool) -> Path:
    """A folder of pictures to train on, and a suite of others with their directions."""
    rows = []
    for part, count in (("train", TRAINED), ("asked", ASKED)):
        (folder / part).mkdir()
        for number in range(count):
            pixels, direction = hatched(np.random.default_rng([part == "asked", number]))
            picture = Image.fromarray(pixels)
            (picture.convert("L").convert("RGB") if grey else picture).save(folder / part / f"{number}.png")
            rows += [{"image": f"asked/{number}.png", "caption": f"direction {direction}"}] if part == "asked" else []
    (folder / "directions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return write_hatched(tmp_path_factory.mktemp("hatched"), grey=False)


def recipe_of(drawn: Path, objective: str, steps: int, lr: float, model: dict[str, Any], **stage: Any) -> Recipe:
    behind = "projector" if objective == "mae" else "heads"
    return Recipe.model_validate({
        "name": "learn", "model": model, "tokenizer": {"train_vocabulary_size": 330},
        "data": {"sources": {"pictures": {"uri": str(drawn / "train"), "kind": "picture"}}},
        "stages": [{
            "name": "one", "objective": objective, "train": {"vision": {"lr": lr}, behind: {"lr": lr}}, "precision": "fp32",
            "mixture": {"weights": {"pictures": 1.0}}, "sequence_length": 16, "budget": {"steps": steps},
            "batch": {"packs": 1, "samples_per_pack": 64}, "schedule": {"kind": "cosine", "warmup": 0.1},
            "optimizer": {"betas": [0.9, 0.98], "weight_decay": 0.05, "clip": 3.0}, "data_loading": {"engine": "inline"}, **stage,
        }],
    })  # fmt: skip


def scores(folder: Path, drawn: Path, out: Path) -> dict[str, float]:
    names = [f"{kind}:{drawn / 'directions.jsonl'}" for kind in ("knn", "probe")]
    found = evaluate_model(folder, names, out, Settings(device="cpu", batch_size=200))["suites"]
    return {name.partition(":")[0]: round(suite["scores"]["accuracy"]["value"], 3) for name, suite in found.items()}


def before_and_after(drawn: Path, run_dir: Path, recipe: Recipe) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of random weights and of the trained tower."""
    torch.set_num_threads(1)
    assert check(recipe) == []
    config = model_config(recipe.model)
    state = {name: parameter.detach() for name, parameter in build_model(recipe.model, config).named_parameters()}
    before = scores(export_hf(state, config, None, run_dir / "random"), drawn, run_dir / "before")
    prepare_data(recipe, run_dir / "run", use_ray=False)
    run_stage(recipe, 0, run_dir / "run", 1, WorkerContext())
    after = scores(run_dir / "run" / "stages" / "01-one" / "final", drawn, run_dir / "after")
    lines = [json.loads(line) for line in (run_dir / "run" / "stages" / "01-one" / "metrics.jsonl").read_text().splitlines()]
    told = [(line["step"], round(line["loss"], 3), round(line.get("spread", 0.0), 2)) for line in lines[:: max(1, len(lines) // 5)]]
    print(recipe.stages[0].objective, "before", before, "after", after, "steps", told, lines[-1]["loss"])
    return before, after


SMALL = {"count": 2, "side": 16, "area": [0.15, 0.4], **COLOURS}
DINO = {**HEAD, "prototypes": 256, "momentum": 0.98, "frozen_prototypes": 0.1}
CASES = {  # steps, learning rate, options, and by how much `probe` rises at least
    "simclr": (200, 1e-3, {"simclr": {**HEAD, "temperature": 0.2}, "views": [WHOLE]}, 0.2),
    "dino": (300, 1e-3, {"dino": DINO, "views": [WHOLE, SMALL]}, 0.08),
}


@pytest.mark.parametrize("objective", CASES)
def test_views_teach_the_direction_of_hatching(objective, drawn, tmp_path):
    steps, lr, options, rise = CASES[objective]
    recipe = recipe_of(drawn, objective, steps, lr, {"architecture": "vit", "config": TOWER}, **options)
    before, after = before_and_after(drawn, tmp_path, recipe)
    assert after["probe"] > before["probe"] + rise


def test_with_a_norm_over_the_batch_a_small_dino_keeps_away_from_both_collapses(drawn, tmp_path):
    """Without it the vectors of so small batches draw together within twenty steps, and the teacher holds all prototypes for alike."""
    torch.set_num_threads(1)
    options = {**DINO, "norm": "batch", "teacher_temperature": 0.04, "frozen_prototypes": 0.02}
    recipe = recipe_of(drawn, "dino", 60, 5e-4, {"architecture": "vit", "config": TOWER}, dino=options, views=[WHOLE])
    prepare_data(recipe, tmp_path, use_ray=False)
    run_stage(recipe, 0, tmp_path, 1, WorkerContext())
    lines = [json.loads(line) for line in (tmp_path / "stages" / "01-one" / "metrics.jsonl").read_text().splitlines()]
    print("dino", [tuple(round(line[name], 2) for name in ("step", "loss", "spread", "teacher_entropy")) for line in lines[::10]])
    assert all(0.2 < line["teacher_entropy"] < 0.9 for line in lines)
    assert lines[-1]["spread"] > 0.3


MASKED = {
    **TOWER, "patch_size": 4, "decoder_hidden_size": 64, "decoder_intermediate_size": 128, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4, "norm_pix_loss": True,
}  # fmt: skip


def test_features_of_a_masked_autoencoder_tell_the_direction(tmp_path):
    """Of grey pictures: what it draws are colours too, and nearest neighbours go by them."""
    (tmp_path / "grey").mkdir()
    drawn = write_hatched(tmp_path / "grey", grey=True)
    recipe = recipe_of(drawn, "mae", 300, 1.5e-3, {"architecture": "vit_mae", "config": MASKED})
    before, after = before_and_after(drawn, tmp_path, recipe)
    assert after["knn"] > before["knn"] + 0.15
    assert after["probe"] > before["probe"] + 0.3
