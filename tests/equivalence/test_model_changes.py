"""Changes of the model between stages: planned, made once, resumed to the same bits, exported, and undone by `start_from`."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONFIGS
from packs import tiny_recipe
from PIL import Image

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import load_prepared, prepare_data, stage_data
from terrace.errors import Preempted
from terrace.models.build import build_model, model_config
from terrace.models.surgery import stretched_positions
from terrace.models.tensor_files import Directory
from terrace.planner.plan import make_plan
from terrace.recipe.changes import stage_model, stage_recipe
from terrace.recipe.loading import recipe_hash, stage_hash
from terrace.recipe.rules import check
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

PARTS = {part: {"lr": 1e-3} for part in ("vision", "projector", "language")}


def write_rows(folder: Path) -> None:
    rows = []
    for number, (name, colour) in enumerate([("red", (220, 30, 30)), ("green", (30, 200, 60)), ("blue", (40, 60, 220))] * 5):
        Image.new("RGB", (40 + 5 * number, 90 - 3 * number), colour).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"A picture in {name}, number {number}."})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights_of(run_dir: Path, stage: str) -> str:
    return hashlib.sha256((run_dir / "stages" / stage / "final" / "model.safetensors").read_bytes()).hexdigest()


def recipe_of(folder, changes: dict, config: dict | None = None, architecture: str = "terrace_vlm") -> Recipe:
    """Three stages: as it is, changed, and one that starts from the first again. The changed one trains a little."""
    common = {
        "sequence_length": 512, "precision": "fp32", "batch": {"packs": 2}, "pixels": {"min": 784, "max": 12_544},
        "checkpoint": {"every_steps": 1}, "schedule": {"kind": "constant", "warmup": 0}, "loss_chunk_tokens": 64, "train": PARTS,
        "data_loading": {"engine": "inline", "window_samples": 32}, "evaluate": {"max_samples_per_kind": 2},
        "mixture": {"weights": {"captions": 1.0}},
    }  # fmt: skip
    return Recipe.model_validate({
        "name": "changes", "model": {"architecture": architecture, "config": config or CONFIGS["terrace_vlm"]},
        "data": {"sources": {"captions": {"uri": str(folder / "captions.jsonl"), "kind": "caption", "holdout_samples": 3}}},
        "tokenizer": {"train_vocabulary_size": 400},
        "stages": [
            {"name": "before", "budget": {"steps": 1}, **common},
            {"name": "changed", "budget": {"steps": 3}, "model_changes": changes, **common},
            {"name": "after", "budget": {"steps": 1}, **common},
            {"name": "back", "budget": {"steps": 1}, "start_from": "before", **common},
        ],
    })  # fmt: skip


def test_positions_and_rope_base_change_between_stages(tmp_path):
    """56 to 84 pixels, RoPE base 10 000 to 800 000: shapes, data, plan, resume, export, the stage after it and the way back."""
    torch.set_num_threads(1)
    write_rows(tmp_path)
    recipe = recipe_of(tmp_path, {"interpolate_positions": 84, "rope_base": 800000.0})
    assert check(recipe) == []
    sides = [stage_model(recipe, number).config["vision_config"]["image_size"] for number in range(4)]
    assert sides == [56, 84, 84, 56]
    seen = stage_recipe(recipe, 1)
    assert stage_hash(seen, 1) == stage_hash(recipe, 1)
    assert recipe_hash(seen) == recipe_hash(recipe)
    assert stage_recipe(seen, 3).model.config["vision_config"]["image_size"] == 56
    run_dir = tmp_path / "run"
    prepare_data(recipe, run_dir, use_ray=False)
    for number in range(4):
        run_stage(recipe, number, run_dir, 1, WorkerContext())
    finals = [run_dir / "stages" / name / "final" for name in ("01-before", "02-changed", "03-after", "04-back")]
    configs = [json.loads((final / "config.json").read_text()) for final in finals]
    assert [config["vision_config"]["image_size"] for config in configs] == sides
    assert [config["text_config"]["rope_parameters"]["rope_theta"] for config in configs] == [10000.0, 800000.0, 800000.0, 10000.0]
    table = "model.vision_tower.embeddings.position_embedding.weight"
    assert [Directory(final).shape(table)[0] for final in finals] == [17, 37, 37, 17]
    plan = make_plan(recipe)
    assert [stage.parameters["vision"] - plan.stages[0].parameters["vision"] for stage in plan.stages] == [0, 20 * 32, 20 * 32, 0]
    # What the changed stage begins with is the first one's final weights, only its positions stretched.
    prepared = load_prepared(run_dir / "data")
    seen, data = stage_data(recipe, 1, prepared)
    assert (data.family.side, prepared.family.side, data.indexes["captions"].family.side) == (84, 56, 84)
    config = model_config(seen.model, prepared.tokenizer())
    model = build_model(seen.model, config, start=finals[0], changes=recipe.stages[1].model_changes)
    before = Directory(finals[0])
    for name, parameter in model.named_parameters():
        old = before.read(name)
        expected = stretched_positions(old, tuple(parameter.shape)) if name == table else old
        assert torch.equal(parameter, expected), name
    # Stopped inside the changed stage, it ends with the same bits.
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "stages" / "02-changed")
    asked = iter(range(100))
    with pytest.raises(Preempted):
        run_stage(recipe, 1, again, 1, WorkerContext(should_stop=lambda: "told" if next(asked) >= 1 else None))
    run_stage(recipe, 1, again, 2, WorkerContext())
    assert weights_of(again, "02-changed") == weights_of(run_dir, "02-changed")


def test_positions_are_stretched_by_bicubic_convolution_beside_other_tokens():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1 + 16, 6, generator=generator)
    wide = stretched_positions(table, (1 + 36, 6))
    assert torch.equal(wide[0], table[0])

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    weights = np.zeros((6, 4))
    for place in range(6):
        centre = (place + 0.5) * 4 / 6 - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[place, min(max(tap, 0), 3)] += kernel(centre - tap)
    expected = np.einsum("ar,bc,rcw->abw", weights, weights, table[1:].view(4, 4, 6).numpy()).reshape(36, 6)
    np.testing.assert_allclose(wide[1:].numpy(), expected, atol=1e-5)
    assert stretched_positions(table[None], (1, 37, 6)).shape == (1, 37, 6)  # InternVL's table has a batch dimension
    with pytest.raises(ValueError, match="cannot be stretched"):
        stretched_positions(table, (36, 6))


def test_mistakes_are_named():
    def told(changes: dict, **stage) -> list[str]:
        values = tiny_recipe([{"name": "one"}, {"name": "two", "model_changes": changes, **stage}]).model_dump(mode="json")
        return [str(problem) for problem in check(Recipe.model_validate(values)) if "model_changes" in str(problem) or stage]

    assert any("no learned positions of one fixed picture size" in line for line in told({"interpolate_positions": 448}))
    assert any("changes nothing" in line for line in told({}))
    assert told({"rope_base": 5e5}) == []
    recipe = recipe_of(Path("/none"), {"interpolate_positions": 90})
    assert any("90 is no multiple of patch_size 14" in str(problem) for problem in check(recipe))
