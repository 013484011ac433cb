"""Rules about changes of the model between stages: what the family can change, and what training may go on beside it."""

from __future__ import annotations

from collections.abc import Iterator

from terrace.errors import InputError
from terrace.families.configurations import language_config
from terrace.families.interface import Family
from terrace.families.registry import family_class
from terrace.recipe.changes import stage_model
from terrace.recipe.errors import Path, Problem
from terrace.recipe.schema import PARTS, Recipe, Stage
from terrace.recipe.schema_model import Model


def check(recipe: Recipe, stage: Stage, at: Path, index: int) -> Iterator[Problem]:
    changes, key = stage.model_changes, (*at, "model_changes")
    if changes is None:
        return
    if not changes.model_dump(exclude_none=True):
        yield Problem(key, "changes nothing; name a change or leave it out")
    begun = stage_model(without_changes(recipe, index), index)
    if begun.config is None:
        yield Problem(key, "needs the configuration written out: model.config with model.init in place of model.pretrained")
        return
    try:
        family = family_class(begun.architecture)
    except InputError:
        return  # an unknown family, which is said already
    side = changes.interpolate_positions
    if side is not None:
        try:
            resized = family.resized(begun.config, side)
        except (KeyError, TypeError, ValueError, AttributeError):
            return  # the map is wrong, which is said where it stands
        if resized is None:
            yield Problem((*key, "interpolate_positions"), f"{family.name} has no learned positions of one fixed picture size to stretch")
        else:
            before = {message for _, message in family.check(begun.config, True)}
            for path, message in family.check(stage_model(recipe, index).config or {}, True):
                if message not in before:
                    yield Problem((*key, "interpolate_positions"), f"{'.'.join(path)}: {message}")
        if stage.train.vision is not None and stage.train.vision.optimizer_state == "keep":
            yield Problem(
                (*at, "train", "vision", "optimizer_state"),
                "the moments of stretched positions have no meaning: set optimizer_state: reset in a stage that interpolates them",
            )
    if changes.add_tokens is not None:
        yield from _tokens(begun, stage, at)
    if changes.upcycle is not None:
        yield from _upcycle(begun, stage, at, family)
    for part in PARTS:
        training = getattr(stage.train, part)
        if training is not None and training.lora is not None and training.optimizer_state == "keep":
            yield Problem((*at, "train", part), "adapters cannot go on through a change of the model; set optimizer_state: reset")


def without_changes(recipe: Recipe, index: int) -> Recipe:
    """The recipe whose stage `index` changes nothing of the model that it begins with."""
    without = recipe.stages[index].model_copy(update={"model_changes": None})
    return recipe.model_copy(update={"stages": [without if place == index else one for place, one in enumerate(recipe.stages)]})


def _tokens(before: Model, stage: Stage, at: Path) -> Iterator[Problem]:
    key, language = (*at, "model_changes", "add_tokens"), stage.train.language
    if "vocab_size" not in language_config(before.config or {}):
        yield Problem(key, "needs `vocab_size` in model.config: a tokenizer that is trained here has its tokens from the first stage on")
    if family_class(before.architecture).spare_rows:
        yield Problem(key, f"{before.architecture} keeps the rows of its own marks behind the vocabulary: a longer one would move them")
    if language is None or language.lora is not None:
        yield Problem(key, "adds rows of embedding and output layer, which nothing trains in this stage: train `language` without adapters")
    elif language.optimizer_state == "keep":
        told = "the moments of a smaller vocabulary do not fit: set optimizer_state: reset"
        yield Problem((*at, "train", "language", "optimizer_state"), told)


def _upcycle(before: Model, stage: Stage, at: Path, family: type[Family]) -> Iterator[Problem]:
    wanted, key = stage.model_changes.upcycle, (*at, "model_changes", "upcycle")  # type: ignore[union-attr]
    if family.upcycled(before.config or {}, {"count": 2, "per_token": 1, "layers": "all"}) is None:
        yield Problem(key, f"the class of {family.name} has no mixture of experts; architecture terrace_vlm has")
    elif (before.config or {}).get("experts") is not None:
        yield Problem(key, "the model is a mixture of experts already, since an earlier stage")
    if wanted.per_token > wanted.experts:
        yield Problem((*key, "per_token"), f"{wanted.per_token} is more than the {wanted.experts} experts")
    if stage.train.language is None:
        yield Problem(key, "makes experts that begin as equal copies, and the language model is frozen in this stage: train `language`")
    elif stage.train.language.optimizer_state == "keep":
        yield Problem(
            (*at, "train", "language", "optimizer_state"), "the moments of a dense layer are not its experts': set optimizer_state: reset"
        )
