"""Rules about changes of the model between stages: what the family can change, and what training may go on beside it."""

from __future__ import annotations

from collections.abc import Iterator

from terrace.errors import InputError
from terrace.families.registry import family_class
from terrace.recipe.changes import stage_model
from terrace.recipe.errors import Path, Problem
from terrace.recipe.schema import PARTS, Recipe, Stage


def check(recipe: Recipe, stage: Stage, at: Path, index: int) -> Iterator[Problem]:
    changes, key = stage.model_changes, (*at, "model_changes")
    if changes is None:
        return
    if not changes.model_dump(exclude_none=True):
        yield Problem(key, "changes nothing; name a change or leave it out")
    if recipe.model.config is None:
        yield Problem(key, "needs the configuration written out: model.config with model.init in place of model.pretrained")
        return
    try:
        family = family_class(recipe.model.architecture)
    except InputError:
        return  # an unknown family, which is said already
    side = changes.interpolate_positions
    if side is not None:
        if family.resized(recipe.model.config, side) is None:
            yield Problem((*key, "interpolate_positions"), f"{family.name} has no learned positions of one fixed picture size to stretch")
        else:
            before = {message for _, message in family.check(recipe.model.config, True)}
            for path, message in family.check(stage_model(recipe, index).config or {}, True):
                if message not in before:
                    yield Problem((*key, "interpolate_positions"), f"{'.'.join(path)}: {message}")
        if stage.train.vision is not None and stage.train.vision.optimizer_state == "keep":
            yield Problem(
                (*at, "train", "vision", "optimizer_state"),
                "the moments of stretched positions have no meaning: set optimizer_state: reset in a stage that interpolates them",
            )
    for part in PARTS:
        training = getattr(stage.train, part)
        if training is not None and training.lora is not None and training.optimizer_state == "keep":
            yield Problem((*at, "train", part), "adapters cannot go on through a change of the model; set optimizer_state: reset")
