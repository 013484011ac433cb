"""Rules about a stage that brings a model of its own: where its parts come from, and whether what it takes of earlier stages fits.

What fits is asked of the families' shapes here, in microseconds; the tensors themselves are compared by name before the first stage
runs (models.taken).
"""

from __future__ import annotations

from collections.abc import Iterator

from terrace.errors import InputError, nearest
from terrace.families.registry import family_class
from terrace.families.shapes import ModelShape
from terrace.recipe.changes import stage_model
from terrace.recipe.errors import Path, Problem
from terrace.recipe.identity import judge_names
from terrace.recipe.schema import Recipe, Stage
from terrace.recipe.schema_model import FROM_STAGE, Model

VISION = {"depth": "layers", "width": "hidden size", "intermediate": "intermediate size", "heads": "attention heads"}
LANGUAGE = {
    "layers": "layers", "width": "hidden size", "intermediate": "intermediate size", "heads": "attention heads",
    "key_heads": "key and value heads", "head_size": "head size",
}  # fmt: skip


def check(recipe: Recipe, stage: Stage, at: Path, index: int) -> Iterator[Problem]:
    if index == 0 and recipe.model.init is not None:
        for part in recipe.model.init.stages():
            yield Problem(("model", "init", part), "there is no earlier stage; `stage:NAME` stands in the model of a stage")
    names = [one.name for one in recipe.stages]
    for name in judge_names(stage):
        if name not in names[:index]:
            yield Problem((*at, "rewards"), f"stage `{name}` {_not_before(name, names, index)}; earlier stages judge answers")
    if stage.model is None:
        return
    key: Path = (*at, "model")
    if index == 0:
        yield Problem(key, "is that of the first stage, which is the recipe's own: write it as `model` of the recipe")
    if stage.start_from is not None:
        yield Problem(
            (*at, "start_from"),
            f"a stage with a `model` of its own takes no stage's weights as a whole; name the parts: model.init.vision: {FROM_STAGE}"
            f"{stage.start_from}",
        )
    for part, name in (stage.model.init.stages() if stage.model.init is not None else {}).items():
        place: Path = (*key, "init", part)
        if name not in names[:index]:
            yield Problem(place, f"stage `{name}` {_not_before(name, names, index)}; a part comes from an earlier stage")
            continue
        yield from _fits(stage.model, stage_model(recipe, names.index(name)), part, name, place)


def _not_before(name: str, names: list[str], index: int) -> str:
    return "does not run before this one" if name in names else f"does not exist{nearest(name, names[:index])}"


def _fits(model: Model, source: Model, part: str, name: str, place: Path) -> Iterator[Problem]:
    """Whether a part of the source has the shape that the model gives it."""
    for one, whose in ((source, f"the model of stage `{name}`"), (model, "this model")):
        try:
            if part not in (parts := family_class(one.architecture).parts):
                yield Problem(place, f"{whose}, a {one.architecture}, has no part {part}; it has {' and '.join(parts)}")
                return
        except InputError:
            return  # said elsewhere
    ours, theirs = _shape(model), _shape(source)
    if ours is None or theirs is None or part == "projector":
        return
    if part == "language" and not theirs.language.layers:
        yield Problem(place, f"stage `{name}` trains a {source.architecture}, which has no language part")
        return
    fields = VISION if part == "vision" else LANGUAGE
    differing = [
        f"{getattr(getattr(ours, part), field)} {word} here, {getattr(getattr(theirs, part), field)} there"
        for field, word in fields.items()
        if getattr(getattr(ours, part), field) != getattr(getattr(theirs, part), field)
    ]
    if differing:
        yield Problem(place, f"the {part} part of stage `{name}` does not fit: {'; '.join(differing)}")


def _shape(model: Model) -> ModelShape | None:
    """None where the configuration is not written out, or has mistakes that are said elsewhere."""
    if model.config is None:
        return None
    try:
        return family_class(model.architecture).shape(model.config, 1)
    except (InputError, KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        return None

