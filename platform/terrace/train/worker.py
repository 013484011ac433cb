"""What one training worker runs, whoever started it: Ray Train, torchrun, or a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from terrace.errors import InputError
from terrace.recipe.schema import Recipe
from terrace.storage import mirror
from terrace.train.context import WorkerContext
from terrace.train.feed import open_feed
from terrace.train.loop import Observer, StageResult, train_stage


def stage_folder(recipe: Recipe, stage_index: int, run_dir: Path) -> Path:
    """`<run-dir>/stages/<NN>-<name>`, NN from 01."""
    return run_dir / "stages" / f"{stage_index + 1:02d}-{recipe.stages[stage_index].name}"


def start_weights_of(recipe: Recipe, stage_index: int, run_dir: Path) -> Path | None:
    """The `final/` directory of the stage that this one starts from; None for the first: the recipe's own weights.

    Raises InputError if that stage has not finished.
    """
    wanted = recipe.stages[stage_index].start_from
    names = [stage.name for stage in recipe.stages]
    if wanted is None and stage_index == 0:
        return None
    if wanted is not None and wanted not in names:
        raise InputError(f"stage {names[stage_index]}: start_from names {wanted}, which is no stage of the recipe")
    before = names.index(wanted) if wanted is not None else stage_index - 1
    final = stage_folder(recipe, before, run_dir) / "final"
    mirror.fetch_folder(final, mirror.FINAL_LAST)
    if not (final / "config.json").is_file():
        raise InputError(
            f"stage {names[stage_index]} starts from {names[before]}, which has no finished weights in {final}"
        )
    return final


def run_stage(
    recipe: Recipe, stage_index: int, run_dir: Path, attempt: int | None, context: WorkerContext,
    observers: Sequence[Observer] = (),
) -> StageResult:
    """Train one stage of a run directory whose data is prepared (`<run-dir>/data`). Every rank calls it."""
    from terrace.data.prepare import load_prepared

    prepared = load_prepared(run_dir / "data")
    folder = stage_folder(recipe, stage_index, run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    start = start_weights_of(recipe, stage_index, run_dir)
    feed = open_feed(recipe, stage_index, prepared, context)
    return train_stage(recipe, stage_index, feed, folder, start, context, observers, attempt)
