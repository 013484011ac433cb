"""Rules about the optimizer, the schedule, the average of weights and the gradient noise: which options and strategies go together."""

from __future__ import annotations

from collections.abc import Iterator

from terrace.recipe.errors import Path, Problem
from terrace.recipe.schema import Recipe, Schedule, Stage
from terrace.recipe.schema_optimizer import Optimizer

# What each optimizer needs of a parameter: all of it, all or shards of its numbers, or nothing in particular.
STRATEGIES = {"adafactor": ("ddp",), "lars": ("ddp", "fsdp"), "muon": ("ddp", "fsdp")}
WHY = {
    "adafactor": "adafactor keeps sums over whole rows and columns, which {} splits",
    "lars": "lars takes the norms of whole tensors, which {} keeps as flat pieces",
    "muon": "muon orthogonalises whole matrices, which {} keeps as flat pieces",
}


def check(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    yield from _optimizer(stage, at)
    yield from _schedule(stage, (*at, "schedule"))
    strategy = stage.parallel.strategy
    if stage.ema is not None and strategy not in ("ddp", "fsdp"):
        yield Problem((*at, "ema"), f"the average is kept by parameter, and {strategy} steps flat pieces; use ddp or fsdp")
    if stage.gradient_noise:
        workers = stage.resources.workers
        most = workers if isinstance(workers, int) else max(workers)
        if strategy != "ddp" or stage.parallel.sequence_parallel > 1:
            yield Problem((*at, "gradient_noise"), "needs gradients of single workers, which only ddp without sequence_parallel has")
        elif stage.batch.packs < 2 * most:
            yield Problem(
                (*at, "gradient_noise"), f"compares one pack with all: {stage.batch.packs} packs on {most} workers are fewer than two each"
            )


def _optimizer(stage: Stage, at: Path) -> Iterator[Problem]:
    options, strategy, key = stage.optimizer, stage.parallel.strategy, (*at, "optimizer")
    allowed = STRATEGIES.get(options.kind)
    if allowed is not None and strategy not in allowed:
        yield Problem((*key, "kind"), f"{WHY[options.kind].format(strategy)}; use parallel.strategy {' or '.join(allowed)}")
    if options.momentum and options.kind not in ("sgd", "lars", "muon"):
        yield Problem((*key, "momentum"), f"is an option of sgd, lars and muon, not of {options.kind}")
    if options.trust != Optimizer().trust and options.kind != "lars":
        yield Problem((*key, "trust"), f"is an option of lars, not of {options.kind}")
    if options.nesterov and (options.kind != "sgd" or not options.momentum):
        yield Problem((*key, "nesterov"), "is an option of sgd with momentum")


def _schedule(stage: Stage, key: Path) -> Iterator[Problem]:
    schedule, usual = stage.schedule, Schedule()
    for name, kind in (("decay", "wsd"), ("decay_shape", "wsd"), ("milestones", "step"), ("factor", "step")):
        if schedule.kind != kind and getattr(schedule, name) != getattr(usual, name):
            yield Problem((*key, name), f"is an option of kind {kind}, not of {schedule.kind}")
    if schedule.kind == "step" and not schedule.milestones:
        yield Problem((*key, "milestones"), "kind step needs at least one, for example [0.5, 0.75]")
    lengths = {"decay": schedule.decay} | {f"milestones[{place}]": value for place, value in enumerate(schedule.milestones)}
    for name, length in lengths.items():
        if length >= 1 and length != int(length):
            yield Problem((*key, name.partition("[")[0]), f"{length} is neither a share of the steps (below 1) nor a whole number of steps")
    steps = stage.budget.steps
    if schedule.kind == "wsd" and steps is not None:
        warmup, decay = (value if value >= 1 else value * steps for value in (schedule.warmup, schedule.decay))
        if warmup + decay >= steps:
            yield Problem((*key, "decay"), f"warm-up and decay leave none of the stage's {steps} steps at the peak rate")
