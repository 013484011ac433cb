"""How much a stage has to do: steps, tokens and samples from its budget, and what an average pack holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from terrace.data.family import family_of
from terrace.families.shapes import ModelShape
from terrace.planner.data_facts import SampleMeans, SourceFacts
from terrace.planner.flops import PackLoad, assumed_load
from terrace.planner.views import seen_patches
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Budget, Recipe, Stage
from terrace.recipe.schema_mlm import MlmOptions
from terrace.recipe.stretches import stretches

TEXT_BYTES_PER_TOKEN = 4.0
FILL = 0.997  # share of a pack that packing fills


@dataclass(frozen=True)
class SourceShare:
    """A source's part in a stage: its share of the samples, how many that makes, and passes over it (None: unknown)."""

    share: float
    samples: float | None
    epochs: float | None


@dataclass(frozen=True)
class Work:
    """What a stage does. None: it cannot be known without an index (a budget in epochs)."""

    steps: int | None
    tokens: float | None  # sequence positions
    samples: float | None
    exact: bool  # from an index rather than from `planning`
    pack: PackLoad  # an average pack
    pack_bytes: float
    sources: dict[str, SourceShare]


def has_images(recipe: Recipe, stage: Stage) -> bool:
    return any(recipe.data.sources[name].kind != "text" for name in stage.mixture.weights)


def stage_work(recipe: Recipe, stage: Stage, shape: ModelShape, facts: Mapping[str, SourceFacts]) -> Work:
    """The work of one stage. `facts` of every source of its mixture make it exact.

    Of a stage with `changes` each stretch is worked out by itself; the average pack is that of all its steps.
    """
    parts, per_step = stretches(stage), stage.batch.packs * stage.sequence_length
    if len(parts) == 1:
        return _stretch_work(recipe, stage, shape, facts)
    whole = stage.budget.steps or math.ceil((stage.budget.tokens or 0) / per_step)
    ends = [step for step, _ in parts[1:]] + [whole]
    works = []
    for (first, part), end in zip(parts, ends):
        bounds, budget = (part.pixels.min, part.pixels.max), Budget(steps=end - first)
        here = {name: fact.at(bounds) for name, fact in facts.items()}
        works.append(_stretch_work(recipe, part.model_copy(update={"budget": budget}), shape, here))
    return _joined(works)


def _joined(works: list[Work]) -> Work:
    """Stretches one after another; all of them have steps."""
    steps = [work.steps or 0 for work in works]
    samples = sum(work.samples or 0 for work in works)

    def mean(value: Callable[[Work], float]) -> float:
        return sum(count * value(work) for count, work in zip(steps, works)) / sum(steps)

    sources = {}
    for name in dict.fromkeys(name for work in works for name in work.sources):
        found = [work.sources[name] for work in works if name in work.sources]
        taken, passes = sum(source.samples or 0 for source in found), [source.epochs for source in found]
        sources[name] = SourceShare(taken / samples, taken, None if None in passes else sum(p for p in passes if p is not None))
    return Work(
        steps=sum(steps),
        tokens=sum(work.tokens or 0 for work in works),
        samples=samples,
        exact=all(work.exact for work in works),
        pack=PackLoad(*(mean(lambda work, field=field: getattr(work.pack, field)) for field in PackLoad.__dataclass_fields__)),
        pack_bytes=mean(lambda work: work.pack_bytes),
        sources=sources,
    )


def _stretch_work(recipe: Recipe, stage: Stage, shape: ModelShape, facts: Mapping[str, SourceFacts]) -> Work:
    exact = all(facts.get(name) is not None and facts[name].samples > 0 for name in stage.mixture.weights)
    shares = _shares(stage, facts if exact else {})
    pack_tokens = float(stage.sequence_length)
    if OBJECTIVES[stage.objective].counts_rows:
        mean = _mixed({name: facts[name].means for name in shares}, shares) if exact else None
        pack = _load(mean, shape) if mean else _assumed(recipe, stage, shape, shares, _assumed_sample_tokens(recipe, stage, shares))
        pack_bytes = mean.bytes if mean else pack.visual_tokens * recipe.planning.bytes_per_visual_token
        pack = _with_second_answer(pack)
        pack_tokens = sample_tokens = pack.tokens
    elif OBJECTIVES[stage.objective].fixed_packs:
        pack, sample_tokens = _fixed(stage, shape), stage.sequence_length / stage.batch.samples_per_pack
        pack_bytes = stage.batch.samples_per_pack * (
            _mixed({name: facts[name].means for name in shares}, shares).bytes if exact else recipe.planning.bytes_per_visual_token
        )
    elif exact:
        mean = _mixed({name: facts[name].means for name in shares}, shares)
        per_pack = FILL * stage.sequence_length / mean.tokens
        pack, pack_bytes = _load(mean.scaled(per_pack), shape), mean.bytes * per_pack
        sample_tokens = mean.tokens / FILL
    else:
        pack = _assumed(recipe, stage, shape, shares, stage.sequence_length)
        sample_tokens = _assumed_sample_tokens(recipe, stage, shares)
        pack_bytes = pack.visual_tokens * recipe.planning.bytes_per_visual_token
        pack_bytes += (pack.tokens - pack.visual_tokens) * TEXT_BYTES_PER_TOKEN
    if OBJECTIVES[stage.objective].masks:
        pack = replace(pack, supervised_tokens=pack.tokens * (stage.mlm or MlmOptions()).share)
    per_step = stage.batch.packs * pack_tokens
    budget = stage.budget
    samples: float | None = budget.samples
    if budget.epochs is not None:
        samples = budget.epochs * sum(facts[name].samples for name in shares) if exact else None
    if budget.steps is not None:
        steps: int | None = budget.steps
    elif budget.tokens is not None:
        steps = math.ceil(budget.tokens / per_step)
    else:
        steps = None if samples is None else math.ceil(samples * sample_tokens / per_step)
    tokens = None if steps is None else float(steps * per_step)
    if samples is None and tokens is not None:
        samples = tokens / sample_tokens
    sources = {
        name: SourceShare(
            share,
            None if samples is None else samples * share,
            samples * share / facts[name].samples if exact and samples is not None else None,
        )
        for name, share in shares.items()
    }
    return Work(steps, tokens, samples, exact, pack, pack_bytes, sources)


def _fixed(stage: Stage, shape: ModelShape) -> PackLoad:
    """A pack of a fixed number of samples: a whole picture, or its views, and a text of full length each; one visual token is a
    picture."""
    samples, length, views = stage.batch.samples_per_pack, stage.sequence_length, list(seen_patches(stage, shape))
    patches, seen = samples * sum(share * size for size, share in views), samples * sum(share for _, share in views)
    squares = samples * sum(share * (size + shape.vision.extra_tokens) ** 2 for size, share in views)
    return PackLoad(samples * length, 0, samples * length**2, patches, samples, seen, squares, squares)


def _shares(stage: Stage, facts: Mapping[str, SourceFacts]) -> dict[str, float]:
    """Share of each source in samples (in the mixture's unit where sizes are unknown)."""
    mixture = stage.mixture
    weights = dict(mixture.weights)
    if facts:
        for name in weights:
            if mixture.temperature is not None:
                weights[name] *= facts[name].samples ** mixture.temperature
            if mixture.unit == "tokens":
                weights[name] /= facts[name].means.tokens
    whole = sum(weights.values())
    return {name: weight / whole for name, weight in weights.items()}


def _mixed(means: Mapping[str, SampleMeans], shares: Mapping[str, float]) -> SampleMeans:
    parts = [means[name].scaled(share) for name, share in shares.items()]
    names = SampleMeans.__dataclass_fields__
    return SampleMeans(*(sum(getattr(part, name) for part in parts) for name in names))


def _load(mean: SampleMeans, shape: ModelShape) -> PackLoad:
    merge = shape.vision.patches_per_token
    patches = max(mean.visual_tokens, 1.0) * merge
    image = max(mean.image_squares * merge**2 / patches, float(merge))  # mean patches that a patch sees in its image, or its tile
    image = min(image, shape.vision.tile_patches or math.inf)
    window = image if shape.vision.window is None else min(image, float(shape.vision.window**2))
    return PackLoad(
        tokens=mean.tokens,
        supervised_tokens=mean.supervised_tokens,
        token_squares=mean.token_squares,
        patches=patches,
        visual_tokens=patches / merge,
        pictures=patches / image,
        image_squares=patches * image,
        window_squares=patches * window,
    )


def _assumed_sample_tokens(recipe: Recipe, stage: Stage, shares: Mapping[str, float]) -> float:
    planning = recipe.planning
    means = {name: planning.source_tokens_per_sample.get(name, planning.tokens_per_sample) for name in shares}
    return min(stage.sequence_length, sum(share * means[name] for name, share in shares.items()))


def _with_second_answer(row: PackLoad) -> PackLoad:
    """A row of which the index knows the prompt and the first answer: the second one is as long, and sees the prompt as well."""
    answer = row.supervised_tokens
    return replace(
        row, tokens=row.tokens + answer, supervised_tokens=2 * answer, token_squares=row.token_squares + answer * row.tokens
    )


def _assumed(recipe: Recipe, stage: Stage, shape: ModelShape, shares: Mapping[str, float], tokens: float) -> PackLoad:
    """A pack of so many tokens."""
    planning = recipe.planning
    with_images = sum(share for name, share in shares.items() if recipe.data.sources[name].kind != "text")
    visual = planning.visual_token_share * with_images * tokens
    limit = stage.data_loading.max_visual_tokens_per_pack
    visual = visual if limit is None else min(visual, limit)
    segment = _assumed_sample_tokens(recipe, stage, shares)
    image = min(family_of(recipe.model).largest_image_tokens(stage.pixels.max), planning.visual_token_share * segment)
    return assumed_load(shape, tokens, visual, segment, image)
