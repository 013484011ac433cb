"""What a recipe may not say although every field by itself is well formed: rules across fields, sources and stages.

`check` returns every problem with the path of the key to change; it never stops at the first. A rule is a generator
over one stage (or the recipe) and knows only values, so it costs microseconds and runs before anything starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePath

from terrace.errors import InputError, nearest
from terrace.families.interface import Family
from terrace.families.registry import make_family
from terrace.recipe import (
    rules_changes,
    rules_credentials,
    rules_lora,
    rules_model,
    rules_objectives,
    rules_optimizer,
    rules_order,
    rules_parallel,
    rules_places,
    rules_recaption,
    rules_rl,
    rules_stage_model,
    rules_stretches,
)
from terrace.recipe.changes import stage_recipe
from terrace.recipe.errors import Path, Problem
from terrace.recipe.objectives import ASKED_SUITES, OBJECTIVES, VECTOR_SUITES
from terrace.recipe.schema import PARTS, Recipe, Stage

TEXT_KINDS = {"text"}
SUITE_KINDS = (*ASKED_SUITES, *VECTOR_SUITES)  # as in terrace.evaluate
TRAIN_METRICS = (
    "train/loss",
    "train/grad_norm",
    "train/tokens_per_second",
    "train/data_wait_share",
    "train/pack_fill",
    "train/step_seconds",
    "train/expert_balance_loss",
    "train/expert_fullest_share",
    "train/expert_dropped_share",
)


def check(recipe: Recipe) -> list[Problem]:
    """Every problem of a recipe whose fields are well typed, in the order of its keys. Empty: the recipe may run."""
    problems = [*rules_model.check(recipe), *rules_credentials.check(recipe), *rules_places.check(recipe)]
    problems += [*_planning(recipe), *rules_order.check(recipe), *rules_recaption.check(recipe)]
    for index, stage in enumerate(recipe.stages):
        at: Path = ("stages", index)
        seen = stage_recipe(recipe, index)
        for rule in (_parts, _mixture, _budget, _resolution, _workers):
            problems += rule(seen, stage, at)
        for rule in (rules_parallel.check, _precision, _failure, _evaluation, _checkpoint):
            problems += rule(seen, stage, at)
        problems += [*rules_objectives.check(seen, stage, at), *rules_rl.check(recipe, stage, at)]
        problems += rules_optimizer.check(recipe, stage, at)
        problems += [*rules_changes.check(recipe, stage, at, index), *rules_stretches.check(seen, stage, at, _resolution)]
        problems += rules_stage_model.check(recipe, stage, at, index)
        problems += rules_lora.check(recipe, stage, at, _before(recipe, index))
    return problems


def allowed_worker_counts(stage: Stage) -> list[int]:
    """Numbers of workers a stage may run on: within `resources.workers`, and dividing its packs evenly."""
    workers = stage.resources.workers
    low, high = (workers, workers) if isinstance(workers, int) else workers
    ring = stage.parallel.sequence_parallel
    group = math.lcm(ring, stage.parallel.experts)
    return [count for count in range(low, high + 1) if count % group == 0 and stage.batch.packs % (count // ring) == 0]


def nominal_family(recipe: Recipe) -> Family:
    """The family with the numbers of `model.config`, or with its usual ones where that has mistakes or a directory brings them."""
    sound = not any(rules_model.check_model(recipe.model, recipe.tokenizer, ("model",)))
    return make_family(recipe.model.architecture, (recipe.model.config or {}) if sound else {})


def visual_tokens_of_largest_image(family: Family, stage: Stage, source_limit: int | None = None) -> int:
    """Visual tokens of an image resized to `pixels.max`, or to the source's own lower limit."""
    tokens = family.largest_image_tokens(stage.pixels.max)
    return tokens if source_limit is None else min(tokens, source_limit)


# ---------------------------------------------------------------- data


def _planning(recipe: Recipe) -> Iterator[Problem]:
    for name in recipe.planning.source_tokens_per_sample:
        if name not in recipe.data.sources:
            hint = nearest(name, recipe.data.sources)
            yield Problem(("planning", "source_tokens_per_sample", name), f"`{name}` is not a source{hint}")


# ---------------------------------------------------------------- parts and mixture


def _trained(stage: Stage) -> list[str]:
    return [part for part in PARTS if getattr(stage.train, part) is not None]


def _before(recipe: Recipe, index: int) -> Stage | None:
    start = recipe.stages[index].start_from
    if recipe.stages[index].model is not None:
        return None
    if start is None:
        return recipe.stages[index - 1] if index else None
    return next((stage for stage in recipe.stages[:index] if stage.name == start), None)


def _parts(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    trained = _trained(stage)
    if not trained and stage.train.heads is None:
        yield Problem((*at, "train"), "names no part, so the stage trains nothing; name vision, projector or language with its lr")
    sources = [recipe.data.sources[name] for name in stage.mixture.weights if name in recipe.data.sources]
    if trained and "language" not in trained and sources and all(source.kind in TEXT_KINDS for source in sources):
        yield Problem(
            (*at, "mixture"),
            f"has only text, which gives {' and '.join(trained)} no gradient; add a source with images",
        )
    if stage.train.projector is not None and stage.train.projector.layer_decay != 1:
        yield Problem((*at, "train", "projector", "layer_decay"), "the projector has no layers to decay over; leave it out")
    before = _before(recipe, int(at[1]))
    for part in trained:
        if getattr(stage.train, part).optimizer_state == "keep" and (before is None or getattr(before.train, part) is None):
            source = f"stage `{before.name}`, which does not train {part}" if before else "the initial weights"
            yield Problem(
                (*at, "train", part, "optimizer_state"),
                f"there is no optimizer state to keep: `{stage.name}` starts from {source}",
            )


def _mixture(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    sources = recipe.data.sources
    for name in stage.mixture.weights:
        if name not in sources:
            yield Problem((*at, "mixture", "weights", name), f"`{name}` is not a source{nearest(name, sources)}")
    for name in stage.mixture.epoch_caps:
        if name not in stage.mixture.weights:
            hint = nearest(name, stage.mixture.weights)
            yield Problem((*at, "mixture", "epoch_caps", name), f"`{name}` is not in this stage's mixture{hint}")


def _budget(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    given = {key: value for key, value in stage.budget.model_dump().items() if value is not None}
    if len(given) != 1:
        found = f"has {' and '.join(given)}" if given else "is empty"
        yield Problem((*at, "budget"), f"{found}; give exactly one of steps, tokens, samples, epochs")
    warmup = stage.schedule.warmup
    if warmup >= 1 and warmup != int(warmup):
        yield Problem(
            (*at, "schedule", "warmup"),
            f"{warmup} is neither a share of the steps (below 1) nor a whole number of steps",
        )
    steps = stage.budget.steps
    if stage.budget.tokens is not None:
        steps = -int(-stage.budget.tokens // (stage.batch.packs * stage.sequence_length))
    if warmup >= 1 and steps is not None and len(given) == 1 and warmup >= steps:
        yield Problem(
            (*at, "schedule", "warmup"),
            f"{int(warmup)} warm-up steps leave none of the stage's {steps} steps at the peak rate",
        )


def _resolution(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    low, high = stage.pixels.min, stage.pixels.max
    try:
        family = nominal_family(recipe)
    except InputError:
        return  # an unknown family, which is said already
    for path, message in family.check_pixels(low, high):
        yield Problem((*at, "pixels", *path), message)
        return
    markers = len(family.before) + len(family.after)
    for name in stage.mixture.weights:
        source = recipe.data.sources.get(name)
        if source is None or source.kind in TEXT_KINDS:
            continue
        fewest = family.view(1, 1, (1, 1)).tokens
        if source.max_visual_tokens_per_image is not None and source.max_visual_tokens_per_image < fewest:
            yield Problem(
                ("data", "sources", name, "max_visual_tokens_per_image"),
                f"{source.max_visual_tokens_per_image} is less than the {fewest} tokens that {family.name} gives the smallest image",
            )
            break
        if source.too_long == "reduce_resolution":
            continue
        tokens = visual_tokens_of_largest_image(family, stage, source.max_visual_tokens_per_image)
        if tokens + markers >= stage.sequence_length:
            told = f"{tokens} visual tokens and {markers} markers leave no room for text; raise it"
            if tokens > family.largest_image_tokens(1):  # otherwise pixels.max changes nothing
                told += f" or lower pixels.max below {(stage.sequence_length - markers) * family.unit}"
            yield Problem(
                (*at, "sequence_length"),
                f"{stage.sequence_length} tokens do not hold one image of `{name}` at pixels.max {high}: {told}",
            )
            break
        limit = stage.data_loading.max_visual_tokens_per_pack
        if limit is not None and tokens > limit:
            yield Problem(
                (*at, "data_loading", "max_visual_tokens_per_pack"),
                f"{limit} is less than the {tokens} visual tokens of one image of `{name}` at pixels.max {high}",
            )
            break


# ---------------------------------------------------------------- layout


def _workers(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    workers = stage.resources.workers
    low, high = (workers, workers) if isinstance(workers, int) else workers
    key: Path = (*at, "resources", "workers")
    if low < 1 or high < low:
        yield Problem(key, f"{list(workers) if isinstance(workers, tuple) else workers}: give a number from 1 on, or [min, max]")
        return
    ring = stage.parallel.sequence_parallel
    for count in sorted({low, high}):
        if count % ring:
            yield Problem(key, f"{count} workers do not form groups of parallel.sequence_parallel {ring}")
        elif count % stage.parallel.experts:
            yield Problem(key, f"{count} workers do not form groups of parallel.experts {stage.parallel.experts}")
        elif stage.batch.packs % (count // ring):
            near = [n for n in range(1, stage.batch.packs + 1) if stage.batch.packs % n == 0]
            best = sorted(near, key=lambda n: abs(n - count // ring))[:2]
            yield Problem(
                (*at, "batch", "packs"),
                f"{stage.batch.packs} packs cannot be dealt evenly to {count // ring} "
                f"{'groups of workers' if ring > 1 else 'workers'}; {' and '.join(map(str, sorted(best)))} divide it",
            )
    gpus = stage.resources.gpus_per_worker
    if gpus > 1 and gpus != int(gpus):
        yield Problem((*at, "resources", "gpus_per_worker"), f"{gpus} is neither a share of one GPU nor a whole number of GPUs")


def _precision(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    on_gpu = stage.resources.gpus_per_worker > 0
    if stage.precision == "fp16" and not on_gpu:
        yield Problem((*at, "precision"), "fp16 overflows and crawls on CPU; use bf16 or fp32, or set resources.gpus_per_worker")
    if recipe.model.attention in ("varlen", "flash_attn") and not on_gpu:
        yield Problem(
            ("model", "attention"),
            f"{recipe.model.attention} needs a GPU and stage `{stage.name}` has none; auto picks what runs there",
        )


def _failure(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    failure = stage.failure
    if failure.hang_timeout_seconds is not None and failure.hang_timeout_seconds >= failure.stall_timeout_seconds:
        yield Problem(
            (*at, "failure", "hang_timeout_seconds"),
            f"{failure.hang_timeout_seconds:g} is not below stall_timeout_seconds {failure.stall_timeout_seconds:g}: the attempt "
            "would be replaced before its workers say where they hang",
        )


# ---------------------------------------------------------------- evaluation, gates, checkpoints


def produced_metrics(recipe: Recipe, stage: Stage) -> list[str]:
    """Names of the metrics a stage reports that are known before it runs (suites add `eval/<suite>/<metric>`)."""
    sources = [recipe.data.sources[name] for name in stage.mixture.weights if name in recipe.data.sources]
    kinds = dict.fromkeys(source.kind for source in sources if source.holds_out)
    if stage.objective == "grpo":
        tasks = dict.fromkeys(source.task for source in sources if source.holds_out and source.task)
        metrics = [f"eval/{figure}/{task}" for task in tasks for figure in ("reward", "greedy_reward")]
    elif OBJECTIVES[stage.objective].only_kind == "preference":
        metrics = ["eval/preference/loss", "eval/preference/accuracy"] if kinds else []
        metrics += ["eval/preference/margin"] if kinds and OBJECTIVES[stage.objective].answers else []
    elif figures := OBJECTIVES[stage.objective].figures:
        metrics = [f"eval/{kind}/{figure}" for kind in kinds for figure in figures]
    else:
        metrics = [f"eval/{kind}/loss" for kind in kinds] + (["eval/loss"] if kinds else [])
        metrics += [f"eval/acceptance/{number + 1}" for number in range(stage.head_kind[1] if stage.head_kind else 0)] if kinds else []
    return metrics + list(TRAIN_METRICS)


def _metric_problem(recipe: Recipe, stage: Stage, metric: str) -> str | None:
    produced = produced_metrics(recipe, stage)
    words = metric.split("/")
    if metric in produced or (words[0] == "eval" and len(words) > 2 and words[1] in map(suite_label, stage.evaluate.suites)):
        return None
    kinds = {recipe.data.sources[name].kind for name in stage.mixture.weights if name in recipe.data.sources}
    if words[0] == "eval" and words[1:2] and words[1] in kinds and words[2:] == ["loss"]:
        return f"`{metric}` is not measured: no source of kind {words[1]} in this stage's mixture has holdout_samples or holdout_share"
    return f"`{metric}` is not measured in this stage{nearest(metric, produced, limit=12)}"


def suite_label(suite: str) -> str:
    """`kind:stem of the file`: the name of a suite in metrics, as `terrace evaluate` prints it."""
    kind, _, path = suite.partition(":")
    return f"{kind}:{PurePath(path).stem}"


def _evaluation(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    for index, gate in enumerate(stage.gates):
        key: Path = (*at, "gates", index)
        if (gate.below is None) == (gate.above is None):
            found = "has both" if gate.below is not None else "has neither"
            yield Problem(
                key,
                f"{found} `below` and `above`" if gate.below is not None else f"{found} `below` nor `above`; give exactly one",
            )
        if problem := _metric_problem(recipe, stage, gate.metric):
            yield Problem((*key, "metric"), problem)
    labels: list[str] = []
    for number, suite in enumerate(stage.evaluate.suites):
        key = (*at, "evaluate", "suites", number)
        kind, colon, path = suite.partition(":")
        if kind not in SUITE_KINDS:
            yield Problem(key, f"there is no kind of suite {kind!r}{nearest(kind, SUITE_KINDS, limit=12)}")
        elif not colon or not path:
            yield Problem(key, f"name its file as {kind}:PATH")
        elif suite_label(suite) in labels:
            yield Problem(key, f"another suite is {suite_label(suite)} too; rename one of the files")
        elif kind not in (offered := OBJECTIVES[stage.objective].suites):
            can = f"its suites are {', '.join(offered)}" if offered else "leave the suites to the other stages"
            yield Problem(key, f"a model of objective {stage.objective} cannot be asked {kind}; {can}")
        labels.append(suite_label(suite))
    measured = any(metric.startswith("eval/") for metric in produced_metrics(recipe, stage))
    if stage.evaluate.every_steps is not None and not measured and not stage.evaluate.suites:
        yield Problem(
            (*at, "evaluate", "every_steps"),
            "there is nothing to evaluate: no source of the mixture has holdout_samples or holdout_share, and no suite is named",
        )


def _checkpoint(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    checkpoint, key = stage.checkpoint, (*at, "checkpoint")
    if checkpoint.keep_every_steps is not None:
        if checkpoint.every_steps is None:
            yield Problem((*key, "keep_every_steps"), "nothing to keep: checkpoint.every_steps is not given")
        elif checkpoint.keep_every_steps % checkpoint.every_steps:
            yield Problem(
                (*key, "keep_every_steps"),
                f"{checkpoint.keep_every_steps} is not a multiple of every_steps {checkpoint.every_steps}",
            )
    if checkpoint.best_metric is not None:
        if problem := _metric_problem(recipe, stage, checkpoint.best_metric):
            yield Problem((*key, "best_metric"), problem)
        elif checkpoint.every_steps is None:
            yield Problem((*key, "best_metric"), "checkpoint.every_steps is not given: the stage writes one checkpoint, at its end")
        elif checkpoint.best_metric.startswith("eval/") and (
            stage.evaluate.every_steps is None or checkpoint.every_steps % stage.evaluate.every_steps
        ):
            yield Problem(
                (*key, "best_metric"),
                f"`{checkpoint.best_metric}` must be measured at every checkpoint: give an evaluate.every_steps that divides "
                f"checkpoint.every_steps {checkpoint.every_steps}",
            )
