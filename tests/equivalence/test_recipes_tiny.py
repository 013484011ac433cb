"""The published recipes in miniature: every stage trains, the last one is killed and resumes to the same bits, all export."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import pytest
import torch
from recipe_table import PUBLISHED
from tiny_recipes import ENCODERS, FAST, tiny
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMaskedLM, AutoModelForPreTraining

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import prepare_data
from terrace.errors import Preempted
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import PARTS, Recipe
from terrace.worker.context import WorkerContext

CASES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in PUBLISHED]


def folder_of(recipe: Recipe, run_dir: Path, index: int) -> Path:
    return run_dir / "stages" / f"{index + 1:02d}-{recipe.stages[index].name}"


def weights(recipe: Recipe, run_dir: Path, index: int) -> str:
    [file] = sorted((folder_of(recipe, run_dir, index) / "final").glob("*.safetensors"))
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_in_miniature_trains_resumes_and_exports(name: str, tmp_path: Path) -> None:
    recipe, published = tiny(name, tmp_path / "rows"), load_recipe(name)
    for small, stage in zip(recipe.stages, published.stages, strict=True):
        same = ("name", "objective", "start_from", "train", "mixture", "optimizer")
        assert {key: getattr(small, key) for key in same} == {key: getattr(stage, key) for key in same}
        assert small.schedule.kind == stage.schedule.kind
    run_dir, last = tmp_path / "run", len(recipe.stages) - 1
    prepare_data(recipe, run_dir, use_ray=False)
    for index, stage in enumerate(recipe.stages):
        result = run_stage(recipe, index, run_dir, 1, WorkerContext())
        assert result.steps == stage.budget.steps
        assert all(math.isfinite(value) for when in result.evaluation.values() for value in when.values())
        if stage.objective != "grpo":  # which learns nothing where all rewards of a group are equal
            assert trained(recipe, run_dir, index) == {part for part in PARTS if getattr(stage.train, part)}
    # Killed after its first step, by a copy of the run as it stood before the last stage, it ends with the same bits.
    again = tmp_path / "again"
    shutil.copytree(run_dir, again, ignore=shutil.ignore_patterns(folder_of(recipe, run_dir, last).name))
    with pytest.raises(Preempted, match="saved at step 1;"):
        run_stage(recipe, last, again, 1, WorkerContext(should_stop=lambda: "told"))
    run_stage(recipe, last, again, 2, WorkerContext())
    assert weights(recipe, again, last) == weights(recipe, run_dir, last)
    if recipe.model.architecture in ENCODERS:
        load = AutoModelForPreTraining.from_pretrained if recipe.model.architecture == "vit_mae" else vit
        _, report = load(folder_of(recipe, run_dir, last) / "final", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]


def vit(folder: Path, **options: bool) -> tuple[torch.nn.Module, dict[str, object]]:
    return AutoModel.from_pretrained(folder, add_pooling_layer=False, **options)


def trained(recipe: Recipe, run_dir: Path, index: int) -> set[str]:
    """The parts whose weights differ after the stage from what it started from: the exports of both, loaded by transformers.

    What a change of the model stretched has another shape, and says nothing about training.
    """
    from terrace.models.parts import part_parameters
    from terrace.recipe.identity import start_index

    before = start_index(recipe, index)
    if before is None:
        return {part for part in PARTS if getattr(recipe.stages[index].train, part)}  # its start is no export
    first, second = (exported(folder_of(recipe, run_dir, number) / "final") for number in (before, index))
    old = {name: tensor for pairs in part_parameters(first).values() for name, tensor in pairs}
    return {
        part
        for part, pairs in part_parameters(second).items()
        if any(name not in old or (old[name].shape == tensor.shape and not torch.equal(old[name], tensor)) for name, tensor in pairs)
    }


def exported(folder: Path) -> torch.nn.Module:
    masked = AutoConfig.from_pretrained(folder).architectures[0].endswith("ForMaskedLM")
    kind = AutoModelForMaskedLM if masked else AutoModelForImageTextToText
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model
