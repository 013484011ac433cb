"""One stage from its first step to its result: open, resume or start, train, save, evaluate, export. Read it top to
bottom.

It knows nothing of Ray: the worker context says which rank this is and how to report. Every rank runs the same lines;
rank 0 alone writes metrics, results and calls the observers (`observer(event, values)` with the events `started`,
`step`, `evaluation`, `checkpoint`, `finished`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from terrace.data.family import recipe_cost
from terrace.errors import Preempted
from terrace.models.sequence_parallel import open_sequence_group
from terrace.objectives.lm import lm_objective
from terrace.recipe.loading import recipe_hash, stage_hash
from terrace.recipe.schema import Recipe
from terrace.train.checkpoint import CheckpointWriter, json_bytes, write_durably
from terrace.train.collectives import barrier
from terrace.train.context import WorkerContext
from terrace.train.feed import StageFeed
from terrace.train.finish import ask_suites, check_suites, export_final
from terrace.train.held_out_loss import held_out_loss
from terrace.train.measure import Meter
from terrace.train.metrics import MetricsLog, step_line
from terrace.train.optimizer import parameter_groups, schedule_factor
from terrace.train.profiling import StepProfiler
from terrace.train.progress import Progress, next_attempt, resume_or_hand_over
from terrace.train.setup import prepare_strategy
from terrace.train.step import NonFinite, StepOutcome, count_batch, run_step, seed_step
from terrace.train.watchdog import Watchdog, hang_folder, hang_timeout_seconds

log = logging.getLogger(__name__)

Observer = Callable[[str, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What `result.json` says: the file's presence means that the stage is complete."""

    steps: int
    loss: float | None  # of the last step
    evaluation: dict[str, dict[str, float]]  # before and after: held-out loss per kind
    tokens: int
    samples: int
    per_source: dict[str, int]
    seconds: float
    skipped_steps: int = 0
    suites: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # scores by suite of evaluate.suites


def train_stage(
    recipe: Recipe, stage_index: int, feed: StageFeed, stage_dir: Path, start_weights: Path | None,
    context: WorkerContext, observers: Sequence[Observer] = (), attempt: int | None = None,
) -> StageResult:
    """Train a stage to its end, or go on where its newest complete checkpoint stopped. Done already: return its result.

    Raises Preempted after saving when told to stop, NonFinite when a loss or gradient is not a number and the recipe
    says stop.
    """
    stage = recipe.stages[stage_index]
    result_file = stage_dir / "result.json"
    if result_file.is_file():
        return StageResult(**json.loads(result_file.read_text()))
    check_suites(stage)
    notify = notifier(observers, context)
    attempt = next_attempt(stage_dir / "checkpoints", context) if attempt is None else attempt
    with Watchdog(hang_folder(stage_dir, attempt), hang_timeout_seconds(stage), context, stage.name) as watchdog:
        progress, after = _train_and_export(
            recipe, stage_index, feed, stage_dir, start_weights, context, notify, attempt, watchdog
        )
    # What the stage trained with is gone from memory by now: the suites ask the model that was written.
    result = progress.result(after, ask_suites(stage, stage_dir, context))
    if context.rank == 0:
        write_durably(result_file, json_bytes(result))
    barrier(context)
    notify("finished", result)
    return StageResult(**result)


def _train_and_export(
    recipe: Recipe, stage_index: int, feed: StageFeed, stage_dir: Path, start_weights: Path | None,
    context: WorkerContext, notify: Observer, attempt: int, watchdog: Watchdog,
) -> tuple[Progress, dict[str, float]]:
    """The stage up to its Hugging Face directory: how far it came, and the held-out loss per kind at its end."""
    stage = recipe.stages[stage_index]

    # Open: model, optimizer, checkpoint folder.
    sequence = open_sequence_group(stage.parallel.sequence_parallel, context.rank, context.world_size)
    objective = lm_objective(stage.loss_chunk_tokens)
    strategy = prepare_strategy(recipe, stage, feed.config, context, objective, start_weights)
    groups = parameter_groups(strategy.model, stage)
    writer = CheckpointWriter(stage_dir / "checkpoints", stage.checkpoint, context, attempt)
    barrier(context)

    # Resume from the newest complete checkpoint, or start from the previous stage's weights.
    identity = stage_hash(recipe, stage_index)
    progress = resume_or_hand_over(strategy, feed, stage, identity, stage_dir, start_weights, context)

    def held_out() -> dict[str, float]:
        def alive() -> None:
            watchdog.mark(progress.step, "evaluating held-out samples after")

        alive()
        return held_out_loss(strategy, feed.held_out, stage.precision, context, sequence, alive)

    if progress.evaluation_before is None:
        progress.evaluation_before = held_out()
    metrics = MetricsLog(stage_dir / "metrics.jsonl", progress.step) if context.rank == 0 else None
    notify("started", {"stage": stage.name, "step": progress.step, "total_steps": feed.total_steps, "attempt": attempt})
    notify("evaluation", {"when": "before", "loss": progress.evaluation_before})

    def save() -> None:
        if metrics:
            metrics.sync()
        watchdog.rest()  # writing may be slow, and has time limits of its own
        writer.wait()
        if stage.checkpoint.asynchronous:
            watchdog.mark(progress.step, "copying a checkpoint of")
        state = {
            **progress.state(),
            "total_steps": feed.total_steps,
            "data": feed.state(progress.step),
            "recipe_hash": recipe_hash(recipe),
            "stage_hash": identity,
            "loss_scale": strategy.loss_scale.state() if strategy.loss_scale else None,
            "random": {"rule": "seeded per step", "seed": stage.seed},
            "saved_by": {"strategy": stage.parallel.strategy, "world_size": context.world_size},
        }
        path = writer.save(strategy, state)
        context.report({"step": progress.step, "loss": progress.loss}, path)
        notify("checkpoint", {"step": progress.step, "path": str(path)})

    # Train.
    sources, cost = sorted(stage.mixture.weights), recipe_cost(recipe)
    meter = Meter(feed.config, stage, recipe.planning, context)
    profiler = StepProfiler(stage.profile.steps, stage_dir / "profile", context)
    watchdog.mark(progress.step + 1, "waiting for the data of")
    step_started = time.perf_counter()
    for step_input in feed.stream(progress.step):
        number = step_input.step + 1
        doing = functools.partial(watchdog.mark, number)
        doing("counting the batch of all ranks of")
        stop = context.should_stop() is not None
        counts = count_batch(step_input.packs, sources, stop, cost, context, meter, sequence)
        factor = schedule_factor(stage.schedule, step_input.step, feed.total_steps)
        rates = [group.peak_lr * factor for group in groups]
        seed_step(stage.seed, step_input.step, context.rank)
        try:
            if number in progress.left_out:
                raise NonFinite(f"step {number} is left out after a rewind", number, [])
            with profiler.step(number) as profiled:
                outcome = run_step(strategy, step_input.packs, counts, rates, stage, number, context, sequence, doing)
        except NonFinite as error:
            if number not in progress.left_out:
                progress.record_nonfinite(error, stage.failure.on_nonfinite, stage_dir, context)  # raises unless `skip`
            outcome, profiled = StepOutcome(math.nan, math.nan, None, skipped=True), {}

        seconds = time.perf_counter() - step_started
        step_started = time.perf_counter()
        progress.advance(number, counts, outcome.loss, seconds, outcome.skipped)
        line = step_line(number, counts, outcome, stage, factor, seconds, step_input.wait_seconds)
        line |= meter.values(counts.model_flops, seconds) | profiled
        every = stage.evaluate.every_steps
        if every and number % every == 0 and number < feed.total_steps:
            line["evaluation"] = held_out()
            notify("evaluation", {"when": number, "loss": line["evaluation"]})
        if metrics:
            metrics.append(line)
        notify("step", line)

        due = stage.checkpoint.every_steps and number % stage.checkpoint.every_steps == 0
        if counts.stop or due or number == feed.total_steps:
            save()
        if counts.stop and number < feed.total_steps:
            watchdog.rest()
            writer.wait()
            raise Preempted(f"stage {stage.name}: told to stop, saved at step {number}; run again to go on from there")
        watchdog.mark(number + 1, "waiting for the data of")

    # Finish: the last checkpoint on disk, evaluation, the Hugging Face directory.
    watchdog.rest()
    writer.wait()
    barrier(context)
    after = held_out()
    notify("evaluation", {"when": "after", "loss": after})
    watchdog.rest()
    export_final(strategy, stage, feed.config, feed.tokenizer_dir, stage_dir / "final", context)
    if metrics:
        metrics.close()
    return progress, after


def notifier(observers: Sequence[Observer], context: WorkerContext) -> Observer:
    """One observer that tells all of them, on rank 0 only."""

    def notify(event: str, values: dict[str, Any]) -> None:
        if context.rank == 0:
            for observer in observers:
                observer(event, values)

    return notify
