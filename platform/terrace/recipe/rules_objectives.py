"""Rules about an objective and the rest of its stage: the model that it trains, packs of a fixed number of samples, its own options."""

from __future__ import annotations

from collections.abc import Iterator

from terrace.errors import InputError
from terrace.families.registry import built_in, family_class, make_family
from terrace.recipe.errors import Path, Problem
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.rules_views import check as check_views
from terrace.recipe.schema import Recipe, Stage

GIVES = {
    "text": "writes text", "vectors": "gives vectors of pictures and of texts", "pictures": "reads pictures alone",
    "matches": "matches pictures with texts", "tokens": "fills masked tokens of a text",
}  # fmt: skip


def check(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    entry = OBJECTIVES[stage.objective]
    try:
        family = make_family(recipe.model.architecture, recipe.model.config or {})
    except (InputError, TypeError, ValueError, AttributeError):
        return  # named elsewhere
    if not entry.trains(family.gives):
        fitting = [name for name, one in OBJECTIVES.items() if one.trains(family.gives)]
        models = [name for name in built_in() if entry.trains(family_class(name).gives)]
        yield Problem(
            (*at, "objective"),
            f"{stage.objective} trains a model that {GIVES[entry.model]} ({', '.join(models)}); model.architecture {family.name}"
            f" {GIVES[family.gives]}: train it with {' or '.join(fitting)}",
        )
        return
    if entry.fixed_packs:
        yield from _fixed_packs(recipe, stage, at)
    if entry.draws_by_pass:
        for problem in family.check_length(stage.sequence_length):
            yield Problem((*at, "sequence_length"), problem)
    yield from check_views(family, stage, at)
    if stage.objective == "matching":
        yield from _keys(stage, at)
    if stage.pairs is not None and stage.objective not in ("clip", "siglip"):
        yield Problem((*at, "pairs"), f"is an option of objectives clip and siglip; this stage's objective is {stage.objective}")


def _keys(stage: Stage, at: Path) -> Iterator[Problem]:
    options = stage.matching
    if options is None:
        return
    if options.momentum is None:
        for name in ("queue", "distillation"):
            if getattr(options, name):
                yield Problem((*at, "matching", name), "comes from the key encoder; give `momentum` (BLIP: 0.995)")
        return
    if stage.parallel.strategy == "zero3":
        yield Problem((*at, "parallel", "strategy"), "zero3 is not offered with matching.momentum; use fsdp, which splits as much")
    for part in ("vision", "projector"):
        training = getattr(stage.train, part)
        if training is not None and training.lora is not None:
            yield Problem((*at, "train", part, "lora"), "adapters are not offered with matching.momentum, which follows whole weights")


def _fixed_packs(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    if stage.budget.tokens is not None:
        yield Problem((*at, "budget"), f"of objective {stage.objective} is steps, samples or epochs: its packs are no sequences of tokens")
    if stage.changes:
        yield Problem((*at, "changes"), f"are for packs of sequences; under objective {stage.objective} write a stage for each resolution")
    if stage.mixture.unit == "tokens":
        yield Problem((*at, "mixture", "unit"), f"is samples under objective {stage.objective}, whose packs hold a fixed number of them")
    for name in stage.mixture.weights:
        source = recipe.data.sources.get(name)
        if source is not None and source.too_long == "split":
            yield Problem(
                ("data", "sources", name, "too_long"),
                f"a caption that is cut up would leave texts without a picture under objective {stage.objective}; use truncate_text",
            )
