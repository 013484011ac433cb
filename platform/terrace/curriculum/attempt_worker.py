"""One stage attempt, seen from a worker: prepared data and a recipe become a feed and an objective, the loop trains, the
suites are asked of what it exported, and the result is written last.

A kill at any moment is followed by an attempt that does what is missing: the steps since the newest checkpoint, or the
suites alone after the last step. The stage is complete when `result.json` is there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terrace.cluster.attempt_files import write_atomic
from terrace.cluster.ray_metrics import metrics_observer
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Recipe, Stage
from terrace.storage.mirror import place_of
from terrace.storage.run_layout import stage_directory

if TYPE_CHECKING:
    from terrace.objectives.interface import StageFeed
    from terrace.storage.run_storage import RunStorage
    from terrace.train.finish import StageResult
    from terrace.train.loop import Observer
    from terrace.worker.context import WorkerContext


def modules_of(recipe: Recipe) -> list[str]:
    """What the workers of a run import, for a process that imports it once for all of them."""
    entries = [OBJECTIVES[stage.objective] for stage in recipe.stages]
    always = ("cluster.local_worker", "data.prepare", "train.start", "train.finish", "train.loop")
    of_objectives = (name for entry in entries for name in (entry.feed, entry.module))
    return list(dict.fromkeys([__name__, *(f"terrace.{name}" for name in always), *of_objectives]))


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
    from terrace.worker.context import WorkerContext
    from terrace.worker.memory import keep_freed_memory

    if device == "cpu":
        keep_freed_memory()
    context = WorkerContext(rank, world_size, local_rank, device, report, should_stop)
    folder = stage_directory(run_dir, stage_index, recipe.stages[stage_index].name)

    def observe(event: str, values: dict[str, Any]) -> None:
        # The number of steps follows from data that only the worker has opened: the display and `terrace status` want
        # it.
        if event == "started":
            write_atomic(folder / "plan.json", json.dumps({"total_steps": values["total_steps"]}))

    metrics = metrics_observer(Path(place_of(run_dir)).name, recipe.stages[stage_index].name)
    run_stage(recipe, stage_index, run_dir, attempt, context, (observe, *metrics))


def run_stage(
    recipe: Recipe, stage_index: int, run_dir: Path, attempt: int | None, context: WorkerContext,
    observers: Sequence[Observer] = (),
) -> StageResult:
    """Train one stage of a run directory whose data is prepared (`<run-dir>/data`). Every rank calls it."""
    from terrace.data.prepare import load_prepared, stage_data
    from terrace.storage.run_storage import run_storage
    from terrace.train.start import start_weights_of, with_taken_parts

    prepared, storage = load_prepared(run_dir / "data"), run_storage(run_dir)
    folder = stage_directory(run_dir, stage_index, recipe.stages[stage_index].name)
    folder.mkdir(parents=True, exist_ok=True)
    start = start_weights_of(recipe, stage_index, run_dir, storage)
    recipe, prepared = stage_data(recipe, stage_index, prepared)
    recipe = with_taken_parts(recipe, stage_index, run_dir, storage)
    opened = importlib.import_module(OBJECTIVES[recipe.stages[stage_index].objective].feed)

    def open_feed() -> StageFeed:
        return opened.open_feed(recipe, stage_index, prepared, context)

    return complete_stage(recipe, stage_index, open_feed, folder, start, context, observers, attempt, storage)


def complete_stage(
    recipe: Recipe, stage_index: int, open_feed: Callable[[], StageFeed], folder: Path, start: Path | None,
    context: WorkerContext, observers: Sequence[Observer] = (), attempt: int | None = None,
    storage: RunStorage | None = None,
) -> StageResult:
    """Train, ask the suites, write the result. Done already: return it, and open nothing."""
    from terrace.train.finish import read_result, write_result
    from terrace.train.loop import notifier, train_stage

    if (done := read_result(folder)) is not None:
        return done
    stage = recipe.stages[stage_index]
    check_suites(stage)
    objective = importlib.import_module(OBJECTIVES[stage.objective].module)
    result = train_stage(
        recipe, stage_index, open_feed(), folder, start, context, objective.open_objective, observers, attempt, storage
    )
    # What the stage trained with is gone from memory by now: the suites ask the model that was written, whole on every machine.
    if stage.evaluate.suites and storage is not None:
        storage.fetch_final(folder / "final")
    result = dataclasses.replace(result, suites=ask_suites(stage, folder, context))
    write_result(folder, result, context)
    notifier(observers, context)("finished", dataclasses.asdict(result))
    return result


def check_suites(stage: Stage) -> None:
    """Raises InputError for a suite that cannot be asked, before the stage spends anything."""
    if stage.evaluate.suites:
        from terrace.evaluate.suites import parse_suite

        for text in stage.evaluate.suites:
            parse_suite(text)


def ask_suites(stage: Stage, folder: Path, context: WorkerContext) -> dict[str, dict[str, float]]:
    """Scores by suite of `folder/final`. All ranks call it, without holding on to what they trained with."""
    if not stage.evaluate.suites:
        return {}
    from terrace.evaluate.stage import evaluate_final  # a stage without suites needs none of the judges' libraries

    return evaluate_final(stage, folder, context)
