"""Functions that test processes run: one stage on packs made in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packs import random_pack

from terrace.curriculum.attempt_worker import complete_stage, run_stage
from terrace.data.types import PackedExample
from terrace.models.build import model_config
from terrace.objectives.interface import StageFeed
from terrace.recipe.schema import Recipe
from terrace.train.finish import StageResult
from terrace.worker.context import WorkerContext, data_place


@dataclass
class Step:
    step: int
    packs: list[PackedExample]
    wait_seconds: float = 0.0


def packs_of_step(step: int, count: int) -> list[PackedExample]:
    """Packs of a global batch: in every second step only the first half of them hold images."""
    with_images = [step % 2 == 0 or place < count // 2 for place in range(count)]
    return [random_pack(step * count + place, with_images[place]) for place in range(count)]


def memory_feed(recipe: Recipe, stage_index: int, context: WorkerContext, poison_step: int | None = None) -> StageFeed:
    """A feed whose packs depend on their number alone. Ranks take consecutive halves, so one has no image every second step."""
    stage = recipe.stages[stage_index]
    rank, ranks = data_place(context, stage.parallel.sequence_parallel)
    share = stage.batch.packs // ranks

    def stream(start: int) -> Iterator[Step]:
        for step in range(start, int(stage.budget.steps or 0)):
            packs = packs_of_step(step, stage.batch.packs)
            yield Step(step, packs[rank * share : (rank + 1) * share])

    return StageFeed(
        config=model_config(recipe.model),
        total_steps=int(stage.budget.steps or 0),
        stream=stream,
        state=lambda step: {"pack": step * stage.batch.packs},
        restore=lambda state: None,
        held_out={"caption": [random_pack(9_000 + k) for k in range(3)], "text": [random_pack(9_003, False)]},
    )


def train(
    recipe: Recipe, index: int, feed: StageFeed, folder: Path, start: Path | None, context: WorkerContext, **options: Any
) -> StageResult:
    """A stage on a feed made in memory, up to its result.json."""
    return complete_stage(recipe, index, lambda: feed, folder, start, context, **options)


def stage_dir(run_dir: Path, index: int) -> Path:
    return run_dir / f"{index + 1:02d}"


def train_stages(
    rank: int, world_size: int, recipe_values: dict[str, Any], run_dir: str, first: int = 0,
    stop_after: int | None = None,
) -> list[StageResult]:
    """The stages from `first` on, each from the one before. `stop_after`: told to stop at that many steps of the first."""
    recipe = Recipe.model_validate(recipe_values)
    results = []
    for index in range(first, len(recipe.stages)):
        asked = 0

        def should_stop() -> str | None:
            nonlocal asked
            asked += 1
            return "test" if stop_after is not None and asked >= stop_after else None

        context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank, should_stop=should_stop)
        folder = stage_dir(Path(run_dir), index)
        folder.mkdir(parents=True, exist_ok=True)
        start = stage_dir(Path(run_dir), index - 1) / "final" if index else None
        results.append(train(recipe, index, memory_feed(recipe, index, context), folder, start, context))
    return results


def run_prepared(rank: int, world_size: int, recipe_values: dict[str, Any], run_dir: str, attempt: int) -> None:
    """The first stage of a recipe over data that was prepared in `run_dir`, from its newest checkpoint."""
    context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
    run_stage(Recipe.model_validate(recipe_values), 0, Path(run_dir), attempt, context)


def train_each(rank: int, world_size: int, recipes: dict[str, dict[str, Any]], out: str) -> None:
    """Every recipe in a folder of its name, one after another in the same processes."""
    for name, values in recipes.items():
        train_stages(rank, world_size, values, str(Path(out) / name))


def continue_copies(rank: int, world_size: int, recipes: dict[str, dict[str, Any]], saved: str, out: str) -> None:
    """Continue a copy of a run's second stage under each of the recipes, one after another."""
    import torch.distributed as dist

    for name, values in recipes.items():
        folder = Path(out) / name
        if rank == 0:
            shutil.copytree(saved, folder)
        dist.barrier()
        train_stages(rank, world_size, values, str(folder), first=1)


def train_with_a_poisoned_pack(rank: int, world_size: int, recipes: dict[str, dict[str, Any]], out: str) -> None:
    """One stage per recipe, in which the first pack of step 2 has pixels that are not numbers."""
    from unittest import mock

    import terrace.objectives.lm as module

    real = module.to_device

    def poisoned(pack: PackedExample, device: Any, dtype: Any) -> Any:
        batch = real(pack, device, dtype)
        if pack.pack == 4:
            batch.pixels = batch.pixels.float()
            batch.pixels[0] = float("nan")
        return batch

    with mock.patch.object(module, "to_device", poisoned):
        for name, values in recipes.items():
            train_stages(rank, world_size, values, str(Path(out) / name))


def train_with_loss_scale(
    rank: int, world_size: int, recipes: dict[str, dict[str, Any]], out: str, value: float
) -> dict[str, int]:
    """One fp16 stage per recipe that starts from a loss scale of `value`; the steps each skipped."""
    from unittest import mock

    from terrace.train.loss_scale import LossScale

    skipped = {}
    for name, values in recipes.items():
        with mock.patch.object(LossScale.__init__, "__defaults__", (value, 1000, 0, 0)):
            skipped[name] = train_stages(rank, world_size, values, str(Path(out) / name))[0].skipped_steps
    return skipped


def losses(run_dir: Path, index: int = 0) -> list[float]:
    lines = (stage_dir(run_dir, index) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
