"""One stage from its first step to its result: open, resume or start, train, save, evaluate, export. Read it top to
bottom.

It knows nothing of Ray: the worker context says which rank this is and how to report. Every rank runs the same lines;
rank 0 alone writes metrics, results and calls the observers (`observer(event, values)` with the events `started`,
`step`, `evaluation`, `checkpoint`, `finished`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from terrace.data.balance import cost_model
from terrace.errors import Preempted
from terrace.objectives.lm import lm_objective
from terrace.recipe.loading import recipe_hash, stage_hash
from terrace.recipe.schema import Recipe
from terrace.train.checkpoint import CheckpointWriter, json_bytes, write_durably
from terrace.train.collectives import barrier
from terrace.train.context import WorkerContext
from terrace.train.evaluation import held_out_loss
from terrace.train.feed import StageFeed
from terrace.train.finish import ask_suites, check_suites, export_final
from terrace.train.metrics import MetricsLog
from terrace.train.optimizer import parameter_groups, part_learning_rates, schedule_factor
from terrace.train.progress import Progress, next_attempt, resume_or_hand_over
from terrace.train.setup import prepare_strategy
from terrace.train.step import NonFinite, count_batch, run_step, seed_step

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
    notify = _notifier(observers, context)
    progress, after = _train_and_export(recipe, stage_index, feed, stage_dir, start_weights, context, notify, attempt)
    # What the stage trained with is gone from memory by now: the suites ask the model that was written.
    result = progress.result(after, ask_suites(stage, stage_dir, context))
    if context.rank == 0:
        write_durably(result_file, json_bytes(result))
    barrier(context)
    notify("finished", result)
    return StageResult(**result)


def _train_and_export(
    recipe: Recipe, stage_index: int, feed: StageFeed, stage_dir: Path, start_weights: Path | None,
    context: WorkerContext, notify: Observer, attempt: int | None,
) -> tuple[Progress, dict[str, float]]:
    """The stage up to its Hugging Face directory: how far it came, and the held-out loss per kind at its end."""
    stage = recipe.stages[stage_index]

    # Open: model, optimizer, checkpoint folder.
    loss = lm_objective(stage.loss_chunk_tokens)
    strategy = prepare_strategy(recipe, stage, feed.config, context, loss, start_weights)
    groups = parameter_groups([name for name, _ in strategy.model.named_parameters()], stage)
    attempt = next_attempt(stage_dir / "checkpoints", context) if attempt is None else attempt
    writer = CheckpointWriter(stage_dir / "checkpoints", stage.checkpoint, context, attempt)
    barrier(context)

    # Resume from the newest complete checkpoint, or start from the previous stage's weights.
    identity = stage_hash(recipe, stage_index)
    progress = resume_or_hand_over(strategy, feed, stage, identity, stage_dir, start_weights, context)
    if progress.evaluation_before is None:
        progress.evaluation_before = held_out_loss(strategy, feed.held_out, stage.precision, context)
    metrics = MetricsLog(stage_dir / "metrics.jsonl", progress.step) if context.rank == 0 else None
    notify("started", {"stage": stage.name, "step": progress.step, "total_steps": feed.total_steps, "attempt": attempt})
    notify("evaluation", {"when": "before", "loss": progress.evaluation_before})

    def save() -> None:
        if metrics:
            metrics.sync()
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
    sources, cost = sorted(stage.mixture.weights), cost_model(recipe.model.config)
    step_started = time.perf_counter()
    for step_input in feed.stream(progress.step):
        counts = count_batch(step_input.packs, sources, context.should_stop() is not None, cost, context)
        factor = schedule_factor(stage.schedule, step_input.step, feed.total_steps)
        rates = [group.peak_lr * factor for group in groups]
        seed_step(stage.seed, step_input.step, context.rank)
        number = step_input.step + 1
        try:
            if number in progress.left_out:
                raise NonFinite(f"step {number} is left out after a rewind", number, [])
            outcome = run_step(
                strategy, step_input.packs, counts, rates, stage.optimizer.clip, number, stage.precision, context
            )
            loss, norm, skipped = outcome.loss, outcome.grad_norm, outcome.skipped
        except NonFinite as error:
            if number not in progress.left_out:
                progress.record_nonfinite(error, stage.failure.on_nonfinite, stage_dir, context)  # raises unless `skip`
            loss, norm, skipped = math.nan, math.nan, True

        seconds = time.perf_counter() - step_started
        step_started = time.perf_counter()
        progress.advance(number, counts, loss, seconds, skipped)
        line = {
            "step": number,
            "loss": loss if math.isfinite(loss) else None,
            "supervised_tokens": counts.supervised_tokens,
            "tokens": counts.tokens,
            "samples": counts.samples,
            "learning_rate": part_learning_rates(stage, factor),
            "grad_norm": norm if math.isfinite(norm) else None,
            "step_seconds": seconds,
            "data_wait_seconds": step_input.wait_seconds,
            "tokens_per_second": counts.tokens / seconds,
            "pack_fill": counts.tokens / (counts.packs * stage.sequence_length),
            "samples_per_source": counts.samples_per_source,
            "max_over_mean_cost": counts.max_over_mean_cost,
            "visual_tokens": counts.visual_tokens,
        }
        if skipped:
            line["skipped"] = True
        every = stage.evaluate.every_steps
        if every and number % every == 0 and number < feed.total_steps:
            line["evaluation"] = held_out_loss(strategy, feed.held_out, stage.precision, context)
            notify("evaluation", {"when": number, "loss": line["evaluation"]})
        if metrics:
            metrics.append(line)
        notify("step", line)

        due = stage.checkpoint.every_steps and number % stage.checkpoint.every_steps == 0
        if counts.stop or due or number == feed.total_steps:
            save()
        if counts.stop and number < feed.total_steps:
            writer.wait()
            raise Preempted(f"stage {stage.name}: told to stop, saved at step {number}; run again to go on from there")

    # Finish: the last checkpoint on disk, evaluation, the Hugging Face directory.
    writer.wait()
    barrier(context)
    after = held_out_loss(strategy, feed.held_out, stage.precision, context)
    notify("evaluation", {"when": "after", "loss": after})
    export_final(strategy, stage, feed.config, feed.tokenizer_dir, stage_dir / "final", context)
    if metrics:
        metrics.close()
    return progress, after


def _notifier(observers: Sequence[Observer], context: WorkerContext) -> Observer:
    def notify(event: str, values: dict[str, Any]) -> None:
        if context.rank == 0:
            for observer in observers:
                observer(event, values)

    return notify
