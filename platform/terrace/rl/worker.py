"""What one worker of a grpo stage runs, whoever started it. The counterpart of train.worker for on-policy stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from terrace.recipe.schema import Recipe
from terrace.rl.loop import train_rl_stage
from terrace.train.context import WorkerContext
from terrace.train.loop import Observer, StageResult
from terrace.train.worker import stage_folder, start_weights_of


def run_stage(
    recipe: Recipe, stage_index: int, run_dir: Path, attempt: int | None, context: WorkerContext,
    observers: Sequence[Observer] = (),
) -> StageResult:
    """Train one grpo stage of a run directory whose data is prepared (`<run-dir>/data`). Every rank calls it."""
    from terrace.data.prepare import load_prepared

    prepared = load_prepared(run_dir / "data")
    folder = stage_folder(recipe, stage_index, run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    start = start_weights_of(recipe, stage_index, run_dir)
    return train_rl_stage(recipe, stage_index, prepared, folder, start, context, observers, attempt)
