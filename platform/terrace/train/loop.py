"""One stage from its first step to its exported weights: open, resume or start, train, save, evaluate, export. Read it top to bottom.

It runs a stage of any objective (objectives.interface) and knows nothing of Ray: the worker context says which rank this is
and how to report. Every rank runs the same lines; rank 0 alone writes metrics and calls the observers
(`observer(event, values)` with the events `started`, `step`, `evaluation`, `checkpoint`, and an objective's own).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.errors import Preempted
from terrace.models.compiled import GRAPHS
from terrace.models.sequence_parallel import open_sequence_group
from terrace.objectives.interface import Objective, Opening, OpenObjective, StageFeed, StageRun, StepExamples
from terrace.recipe.identity import recipe_hash, stage_hash
from terrace.recipe.schema import Recipe, Stage
from terrace.storage.run_storage import OnThisDisk, RunStorage
from terrace.train.checkpoint import CheckpointWriter
from terrace.train.finish import StageResult, export_final, unchanged_base
from terrace.train.measure import Meter
from terrace.train.metrics import MetricsLog, measured, step_line
from terrace.train.optimizer import ParameterGroup, Rate, group_rates, parameter_groups, schedule_factor, weight_decay_at
from terrace.train.profiling import StepProfiler
from terrace.train.progress import Progress, next_attempt, resume_or_hand_over
from terrace.train.settled import settle
from terrace.train.setup import prepare_strategy
from terrace.train.step import BatchCounts, NonFinite, StepOutcome, count_batch, filled_up, nothing_done, run_step, seed_step
from terrace.train.strategies.interface import Strategy
from terrace.train.watchdog import Watchdog, hang_folder, hang_timeout_seconds
from terrace.worker.collectives import barrier
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)

Observer = Callable[[str, dict[str, Any]], None]


@dataclass
class StageInProgress:
    """What a stage consists of while it trains: what the steps, the checkpoints and the end of it share."""

    recipe: Recipe
    stage: Stage
    identity: str  # the stage's hash
    feed: StageFeed
    objective: Objective
    strategy: Strategy
    groups: list[ParameterGroup]
    progress: Progress
    writer: CheckpointWriter
    metrics: MetricsLog | None  # rank 0
    context: WorkerContext
    watchdog: Watchdog
    notify: Observer
    stage_dir: Path

    def evaluate(self) -> dict[str, float]:
        self.watchdog.rest()  # an objective whose evaluation may hang says where it is
        return self.objective.evaluate(
            lambda: self.watchdog.mark(self.progress.step, "evaluating held-out samples after")
        )

    def save(self, line: dict[str, Any]) -> None:
        """Write a checkpoint of the last step, whose line of metrics is given."""
        progress, strategy, context = self.progress, self.strategy, self.context
        if self.metrics:
            self.metrics.sync()
        self.watchdog.rest()  # writing may be slow, and has time limits of its own
        self.writer.wait()
        if self.stage.checkpoint.asynchronous:
            self.watchdog.mark(progress.step, "copying a checkpoint of")
        state = {
            **progress.state(),
            "total_steps": self.feed.total_steps,
            "data": self.feed.state(progress.step),
            "recipe_hash": recipe_hash(self.recipe),
            "stage_hash": self.identity,
            "loss_scale": strategy.loss_scale.state() if strategy.loss_scale else None,
            "random": {"rule": self.objective.random_rule, "seed": self.stage.seed},
            "saved_by": {"strategy": self.stage.parallel.strategy, "world_size": context.world_size},
        }
        path = self.writer.save(strategy, state, measured(line), self.objective.state())
        context.report({"step": progress.step, "loss": progress.loss}, path)
        self.notify("checkpoint", {"step": progress.step, "path": str(path)})
        self.objective.saved(progress.step)


def train_stage(
    recipe: Recipe, stage_index: int, feed: StageFeed, stage_dir: Path, start_weights: Path | None,
    context: WorkerContext, open_objective: OpenObjective, observers: Sequence[Observer] = (), attempt: int | None = None,
    storage: RunStorage | None = None,
) -> StageResult:
    """Train a stage to its end, or go on where its newest complete checkpoint stopped, and export its weights. The result is
    returned, not written: what it still lacks (the suites' scores) is asked for by those above (curriculum.attempt_worker).

    Raises Preempted after saving when told to stop, NonFinite when a loss or gradient is not a number and the recipe
    says stop, NothingLearned when steps make no optimizer step.
    """
    storage = storage or OnThisDisk()
    stage = settle(recipe, recipe.stages[stage_index], feed.config, context)
    notify = notifier(observers, context)
    attempt = next_attempt(stage_dir / "checkpoints", context) if attempt is None else attempt
    sequence = open_sequence_group(stage.parallel.sequence_parallel, context.rank, context.world_size)
    opening = Opening(recipe, stage, feed, context, stage_dir, start_weights, sequence)
    objective = open_objective(opening)
    with (
        Watchdog(hang_folder(stage_dir, attempt), hang_timeout_seconds(stage), context, stage.name) as watchdog,
        contextlib.closing(objective),
    ):
        # Open: model, optimizer, checkpoint folder.
        strategy = prepare_strategy(recipe.model, stage, feed.config, context, objective.loss, start_weights)
        groups = parameter_groups(strategy.model, stage)
        writer = CheckpointWriter(stage_dir / "checkpoints", stage.checkpoint, context, attempt, storage)
        barrier(context)
        objective.begin(StageRun(strategy, notify, watchdog.mark, watchdog.rest))

        # Resume from the newest complete checkpoint, or start from the previous stage's weights.
        identity = stage_hash(recipe, stage_index)
        progress = resume_or_hand_over(
            strategy, objective, feed, stage, identity, stage_dir, start_weights, context, storage
        )
        run = StageInProgress(
            recipe, stage, identity, feed, objective, strategy, groups, progress, writer, None, context, watchdog, notify, stage_dir
        )
        if progress.evaluation_before is None:
            progress.evaluation_before = run.evaluate()
        if context.rank == 0:
            run.metrics = MetricsLog(stage_dir / "metrics.jsonl", progress.step)
        notify("started", {"stage": stage.name, "step": progress.step, "total_steps": feed.total_steps, "attempt": attempt})
        notify("evaluation", {"when": "before", "loss": progress.evaluation_before})

        _train(run, opening)

        # Finish: the last checkpoint on disk, evaluation, the Hugging Face directory.
        watchdog.rest()
        writer.wait()
        progress.check_learned(stage)
        barrier(context)
        after = run.evaluate()
        notify("evaluation", {"when": "after", "loss": after})
        watchdog.rest()
        objective.close()
        base = unchanged_base(recipe.model, stage, start_weights)
        export_final(strategy, recipe, stage_index, feed.config, feed.tokenizer_dir, stage_dir / "final", context, storage, base)
        objective.finished()
        if run.metrics:
            run.metrics.close()
    return progress.result(after, objective.unready_prompts)


def _train(run: StageInProgress, opening: Opening) -> None:
    """The steps from where the stage stands to its last one."""
    stage, progress, objective, feed, context = run.stage, run.progress, run.objective, run.feed, run.context
    sources = sorted(stage.mixture.weights)
    meter = Meter(feed.config, stage, run.recipe.model, run.recipe.planning, context) if objective.measured else None
    profiler = StepProfiler(stage.profile.steps, run.stage_dir / "profile", context)
    saved = boundary = progress.step  # the last step with a checkpoint, and the last that might have had one
    line: dict[str, Any] = {}
    stop = False
    run.watchdog.mark(progress.step + 1, "waiting for the data of")
    step_started = time.perf_counter()
    for taken in objective.steps(progress.step):
        number = taken.step + 1
        doing = functools.partial(run.watchdog.mark, number)
        doing("counting the batch of all ranks of")
        told = context.should_stop() is not None
        counts = count_batch(objective, taken, sources, told, context, meter, opening.sequence)
        stop = stop or counts.stop
        if objective.ends_with_its_samples and not counts.samples and not counts.damaged_samples:
            break  # of a capped mixture: what follows is as empty as this
        factor = schedule_factor(stage.schedule, taken.step, feed.total_steps)
        decay = weight_decay_at(stage.optimizer, taken.step, feed.total_steps)
        seed_step(stage.seed, taken.step, context.rank)
        with profiler.step(number) as profiled:
            outcome, ran = _step(run, taken, counts, group_rates(run.groups, factor, decay), number, doing)

        seconds = time.perf_counter() - step_started
        step_started = time.perf_counter()
        progress.advance(number, counts, outcome.loss, seconds, outcome.skipped)
        line = step_line(number, counts, outcome, stage, factor, seconds, taken.wait_seconds, objective.measured)
        line |= {"weight_decay": decay} if stage.optimizer.final_weight_decay is not None else {}
        if (news := GRAPHS.news()) and context.rank == 0:
            log.info("stage %s, step %d: %s", stage.name, number, news)
        line |= (meter.values(counts.model_flops, seconds) if meter else {}) | profiled | objective.values(ran)
        last = number >= feed.total_steps
        if taken.boundary and not last and _crossed(stage.evaluate.every_steps, boundary, number):
            line["evaluation"] = run.evaluate()
            run.notify("evaluation", {"when": number, "loss": line["evaluation"]})
        if run.metrics:
            run.metrics.append(line)
        run.notify("step", line)
        objective.after_step(number)

        if taken.boundary:
            if stop or last or _crossed(stage.checkpoint.every_steps, boundary, number):
                run.save(line)
                saved = number
            boundary = number
            if stop and not last:
                run.watchdog.rest()
                run.writer.wait()
                raise Preempted(f"stage {stage.name}: told to stop, saved at step {number}; run again to go on from there")
        progress.check_learns(stage, objective.skipped_in_a_row, outcome.reason)
        run.watchdog.mark(number + 1, "waiting for the data of")
    if progress.step < feed.total_steps:
        log.warning(
            "stage %s ends at step %d of %d: its samples are used up", stage.name, progress.step, feed.total_steps
        )
        if progress.step > saved:
            run.save(line)


def _crossed(every: int | None, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in the steps after `before`, up to `now`."""
    return bool(every) and now // every > before // every


def _step(
    run: StageInProgress, taken: StepExamples, counts: BatchCounts, rates: list[Rate], number: int, doing: Callable[[str], None]
) -> tuple[StepOutcome, bool]:
    """The step's outcome, and whether it came as far as its optimizer step. Raises NonFinite unless the recipe says skip."""
    stage, progress, objective = run.stage, run.progress, run.objective
    if number in progress.left_out:
        return nothing_done("left out after a rewind"), False
    if not counts.divisor:
        return nothing_done(objective.why_nothing_trains(taken)), False
    examples = filled_up(objective, taken.examples, counts)
    try:
        return run_step(run.strategy, objective, examples, counts.divisor, rates, stage, number, run.context, doing), True
    except NonFinite as error:
        progress.record_nonfinite(error, stage.failure.on_nonfinite, run.stage_dir, run.context)  # raises unless `skip`
        return nothing_done(str(error)), False


def notifier(observers: Sequence[Observer], context: WorkerContext) -> Observer:
    """One observer that tells all of them, on rank 0 only."""

    def notify(event: str, values: dict[str, Any]) -> None:
        if context.rank == 0:
            for observer in observers:
                observer(event, values)

    return notify
