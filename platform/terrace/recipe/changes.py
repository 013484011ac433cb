"""The recipe as one stage sees it: its own model or an earlier one's, with every change that the stages on the way to it have made.

A pure function of the recipe, so plan, data, training, resumes and exports agree on the model of a stage without anything
written between them, and `start_from` an earlier stage is the way back. The recipe as written stays with the result
(`Model.written`): identities are those of the written one.
"""

from __future__ import annotations

import contextlib
from typing import Any

from terrace.families.configurations import language_config
from terrace.families.registry import family_class
from terrace.recipe.schema import Recipe
from terrace.recipe.schema_changes import ModelChanges
from terrace.recipe.schema_model import Model


def stage_recipe(recipe: Recipe, index: int) -> Recipe:
    """The recipe whose `model` is that of stage `index`. Calling it again, for whatever stage, begins from the written one."""
    model = stage_model(recipe, index)
    return recipe if model is recipe.model else recipe.model_copy(update={"model": model})


def stage_model(recipe: Recipe, index: int) -> Model:
    """The model of a stage: its own, or that of the stage it descends from which has one, or the recipe's; changed by the stages
    from there on and by itself."""
    written = recipe.model.written
    line = _line_of(recipe, index)
    own = recipe.stages[line[0]].model
    begun = written if own is None else own.of_stage(written)
    changes = [change for place in line if (change := recipe.stages[place].model_changes) is not None]
    everywhere = [stage.model_changes.add_tokens or 0 for stage in recipe.stages if stage.model_changes is not None]
    coming = sum(everywhere) - sum(change.add_tokens or 0 for change in changes)
    if not changes or begun.config is None:
        return begun.before_tokens(coming) if coming else begun
    config: dict[str, Any] = dict(begun.config)
    for change in changes:
        config = changed_config(config, change, begun.architecture)
    return begun.with_config(config).before_tokens(coming)


def changed_config(config: dict[str, Any], changes: ModelChanges, architecture: str) -> dict[str, Any]:
    """A configuration map after a stage's changes. The given one stays as it is."""
    if changes.interpolate_positions is not None:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # a map that is wrong is named where it is checked
            config = dict(family_class(architecture).resized(config, changes.interpolate_positions) or config)
    if changes.upcycle is not None:
        wanted = changes.upcycle.model_dump()
        experts = {"count": wanted.pop("experts"), **wanted}
        config = dict(family_class(architecture).upcycled(config, experts) or config)
    if changes.rope_base is not None:
        flat = family_class(architecture).flat
        text = dict(config if flat else config.get("text_config") or {})
        rope = dict(text.get("rope_parameters") or {"rope_type": "default"})
        text.pop("rope_theta", None)
        text = {**text, "rope_parameters": {**rope, "rope_theta": changes.rope_base}}
        config = text if flat else {**config, "text_config": text}
    if changes.add_tokens is not None:
        text = language_config(config)
        text = {**text, "vocab_size": text["vocab_size"] + changes.add_tokens} if "vocab_size" in text else text
        config = text if family_class(architecture).flat else {**config, "text_config": text}
    return config


def _line_of(recipe: Recipe, index: int) -> list[int]:
    """The stages that a stage descends from, the first one first, and itself: up to one that brings a model of its own."""
    names, line = [stage.name for stage in recipe.stages], [index]
    while True:
        if recipe.stages[line[-1]].model is not None:
            return line[::-1]
        place, start = line[-1], recipe.stages[line[-1]].start_from
        before = place - 1 if start is None else names.index(start) if start in names[:place] else -1  # a mistake, said elsewhere
        if before < 0:
            return line[::-1]
        line.append(before)
