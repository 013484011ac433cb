"""One stage attempt, seen from a worker: the adapter between a launcher's plain facts and the trainer's context."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from terrace.cluster.attempt_files import stage_directory, write_atomic
from terrace.recipe.schema import Recipe


def run_in_worker(
    recipe: Recipe,
    stage_index: int,
    run_dir: Path,
    attempt: int,
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    device: str,
    report: Callable[[dict[str, Any], Path | None], None],
    should_stop: Callable[[], str | None],
) -> None:
    """Run the stage in this worker. Raises Preempted after a checkpoint when `should_stop` gave a reason."""
    from terrace.train.context import WorkerContext

    context = WorkerContext(rank, world_size, local_rank, device, report, should_stop)
    objective = recipe.stages[stage_index].objective
    if objective == "lm":
        from terrace.train.worker import run_stage
    else:
        from terrace.rl.worker import run_stage  # grpo and reward_model
    folder = stage_directory(run_dir, stage_index, recipe.stages[stage_index].name)

    def observe(event: str, values: dict[str, Any]) -> None:
        # The number of steps follows from data that only the worker has opened: the display and `terrace status` want
        # it.
        if event == "started":
            write_atomic(folder / "plan.json", json.dumps({"total_steps": values["total_steps"]}))

    run_stage(recipe, stage_index, run_dir, attempt, context, (observe,))
