"""What one worker of a grpo or reward_model stage runs, whoever started it: the counterpart of train.worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from terrace.recipe.schema import Recipe
from terrace.rl.loop import train_rl_stage
from terrace.rl.reward_model_loop import train_reward_model_stage
from terrace.train.context import WorkerContext
from terrace.train.loop import Observer, StageResult
from terrace.train.worker import stage_folder, start_weights_of


def run_stage(
    recipe: Recipe,
    stage_index: int,
    run_dir: Path,
    attempt: int | None,
    context: WorkerContext,
    observers: Sequence[Observer] = (),
) -> StageResult:
    """Train one stage of objective grpo or reward_model of a run directory whose data is prepared (`<run-dir>/data`).
    Every rank calls it."""
    from terrace.data.prepare import load_prepared

    prepared = load_prepared(run_dir / "data")
    folder = stage_folder(recipe, stage_index, run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    start = start_weights_of(recipe, stage_index, run_dir)
    train = train_reward_model_stage if recipe.stages[stage_index].objective == "reward_model" else train_rl_stage
    return train(recipe, stage_index, prepared, folder, start, context, observers, attempt)
