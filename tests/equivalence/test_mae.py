"""Masked autoencoders: loss and gradients are ViTMAE's own on the same masks, for any packs and ranks; resumed, the same bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_ranks
from transformers import AutoModelForPreTraining, ViTMAEForPreTraining

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import prepare_data
from terrace.errors import Preempted
from terrace.models.build import build_model, model_config
from terrace.models.families.registry import family_of_model
from terrace.models.parts import part_parameters
from terrace.objectives.chance import patch_noise
from terrace.objectives.mae import PictureBatch, summed_loss
from terrace.planner.parameters import parameter_counts, part_sizes
from terrace.planner.shapes import shape_of_config
from terrace.recipe.rules import check
from terrace.recipe.schema import Model, Recipe
from terrace.worker.context import WorkerContext

CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    "decoder_hidden_size": 16, "decoder_intermediate_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "norm_pix_loss": True,
}  # fmt: skip
SECTION = {"architecture": "vit_mae", "config": CONFIG}


def test_loss_gradients_parameters_and_start_are_those_of_the_class():
    torch.set_num_threads(1)
    section = Model.model_validate(SECTION)
    config = model_config(section)
    model = build_model(section, config)
    family, shape = family_of_model(model), shape_of_config(config.to_dict(), "vit_mae")
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(model).items()}
    assert parameter_counts(shape) == counted
    assert part_sizes(shape)["vision"].block == sum(p.numel() for p in family.blocks_of(model, "vision")[0].parameters())
    unused = family.unused(config, [name for name, _ in model.named_parameters()])
    sizes = {"vision": 17 * 32, "projector": 17 * 16}
    assert {part: part_sizes(shape)[part].unused for part in sizes} == sizes
    assert sorted(unused) == ["decoder.decoder_pos_embed", "vit.embeddings.position_embeddings"]
    torch.manual_seed(0)
    published = AutoModelForPreTraining.from_config(config)
    assert type(published) is ViTMAEForPreTraining
    for name, width in (("vit.embeddings.position_embeddings", 32), ("decoder.decoder_pos_embed", 16)):
        positions = model.state_dict()[name][0]  # sines and cosines, where the class leaves zeros that never train
        torch.testing.assert_close(positions[1:].square().sum(1), torch.full((16,), width / 2))
        assert len({tuple(row.tolist()) for row in positions}) == 17
    for (name, ours), theirs in zip(model.named_parameters(), published.parameters()):
        if ours.numel() > 64 and name not in unused and "projection" not in name:  # its Xavier start is lost in the class, too
            assert float(ours.detach().std()) == pytest.approx(float(theirs.detach().std()), rel=0.3), name

    rows = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (6, 3 * 32 * 32), dtype=np.uint8))
    noise = torch.from_numpy(patch_noise(0, ["s"] * 6, list("abcdef"), [0] * 6, 16))
    published.load_state_dict(model.state_dict())
    published(pixel_values=family.normalised(rows, torch.float32).view(6, 3, 32, 32), noise=noise).loss.backward()
    total = 0.0
    for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
        loss = summed_loss(model, PictureBatch(len(rows[part]), rows[part], None, noise[part], torch.float32)) / 6
        loss.backward()
        total += float(loss.detach())
    with torch.no_grad():
        wanted = published(pixel_values=family.normalised(rows, torch.float32).view(6, 3, 32, 32), noise=noise).loss
    assert total == pytest.approx(float(wanted), rel=1e-6)
    largest = max(float(p.grad.abs().max()) for p in published.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(model.named_parameters(), published.parameters()):
        if theirs.grad is not None and theirs.requires_grad:
            assert float((ours.grad - theirs.grad).abs().max()) < 2e-6 * largest, name


LAYOUTS = {2: ("ddp", "fsdp", "zero2", "zero3"), 4: ("ddp",)}  # ranks and strategies


def write_pictures(folder: Path) -> None:
    """A folder of pictures and nothing else."""
    rng = np.random.default_rng(1)
    (folder / "pictures").mkdir()
    for number in range(30):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / "pictures" / f"{number}.png")


def recipe_of(folder: Path, **stage: Any) -> Recipe:
    one = {
        "name": "mae", "objective": "mae", "train": {part: {"lr": 1e-3} for part in ("vision", "projector")}, "precision": "fp32",
        "batch": {"packs": 4, "samples_per_pack": 3}, "mixture": {"weights": {"pictures": 1.0}}, "budget": {"steps": 4},
        "checkpoint": {"every_steps": 1}, "schedule": {"kind": "constant", "warmup": 0}, "data_loading": {"engine": "inline"},
    }  # fmt: skip
    source = {"uri": str(folder / "pictures"), "kind": "picture", "holdout_samples": 5}
    return Recipe.model_validate({
        "name": "mae", "model": SECTION, "tokenizer": {"train_vocabulary_size": 330}, "data": {"sources": {"pictures": source}},
        "stages": [{**one, **stage}],
    })  # fmt: skip


def train_pictures(rank: int, world_size: int, values: dict[str, Any], runs: list[str]) -> None:
    """The recipe's stage under each strategy, in a run directory whose data is prepared."""
    for strategy, run in runs:
        recipe = Recipe.model_validate(values)
        [stage] = recipe.stages
        stage = stage.model_copy(update={"parallel": stage.parallel.model_copy(update={"strategy": strategy})})
        run_stage(recipe.model_copy(update={"stages": [stage]}), 0, Path(run), 1, WorkerContext(rank, world_size, rank))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "stages" / "01-mae" / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> str:
    [file] = (run / "stages" / "01-mae" / "final").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_pictures_of_a_source_train_resume_and_export(tmp_path):
    torch.set_num_threads(1)
    write_pictures(tmp_path)
    recipe = recipe_of(tmp_path)
    assert check(recipe) == []
    told = [str(problem) for problem in check(recipe_of(tmp_path, train={"language": {"lr": 1.0}}))]
    assert any("has no part language" in line for line in told)
    run, again, packed, cut, cut_in_one = (tmp_path / name for name in ("run", "again", "packed", "cut", "cut-in-one"))
    for folder in (run, again, packed, cut, cut_in_one):
        prepare_data(recipe, folder, use_ray=False)
    result = run_stage(recipe, 0, run, 1, WorkerContext())
    assert result.evaluation["after"]["picture/loss"] < result.evaluation["before"]["picture/loss"]
    asked = iter(range(100))
    with pytest.raises(Preempted):
        run_stage(recipe, 0, again, 1, WorkerContext(should_stop=lambda: "told" if next(asked) >= 2 else None))
    run_stage(recipe, 0, again, 2, WorkerContext())
    assert weights(again) == weights(run)
    cuts = [{"area": [0.2, 0.5]}]
    assert check(recipe_of(tmp_path, views=cuts)) == []
    run_stage(recipe_of(tmp_path, batch={"packs": 2, "samples_per_pack": 6}), 0, packed, 1, WorkerContext())
    np.testing.assert_allclose(losses(packed), losses(run), rtol=1e-5)
    told = []
    for folder, batch in ((cut, {"packs": 4, "samples_per_pack": 3}), (cut_in_one, {"packs": 1, "samples_per_pack": 12})):
        run_stage(recipe_of(tmp_path, views=cuts, batch=batch, budget={"steps": 2}), 0, folder, 1, WorkerContext())
        told.append(losses(folder))
    np.testing.assert_allclose(told[0], told[1], rtol=1e-5)
    assert abs(told[0][0] - losses(run)[0]) > 1e-4  # other pixels under the same masks
    loaded, told = ViTMAEForPreTraining.from_pretrained(run / "stages" / "01-mae" / "final", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert loaded.config.norm_pix_loss


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_under_every_strategy_give_the_losses_of_one(tmp_path):
    write_pictures(tmp_path)
    recipe = recipe_of(tmp_path)
    runs = {ranks: [(name, str(tmp_path / f"{name}-{ranks}")) for name in names] for ranks, names in LAYOUTS.items()}
    for folder in (tmp_path / "one", *(run for layout in runs.values() for _, run in layout)):
        prepare_data(recipe, Path(folder), use_ray=False)
    values = recipe.model_dump(mode="json")
    train_pictures(0, 1, values, [("ddp", str(tmp_path / "one"))])
    for ranks, layout in runs.items():
        run_ranks(ranks, train_pictures, values, layout, timeout=400)
        for strategy, run in layout:
            np.testing.assert_allclose(losses(Path(run)), losses(tmp_path / "one"), rtol=1e-5, err_msg=f"{strategy} on {ranks}")
