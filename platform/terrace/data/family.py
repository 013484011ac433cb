"""The family of a recipe's model, or of a model directory: its name and the configuration that gives it its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.families.interface import Family
from terrace.families.registry import family_class, make_family, written_architecture
from terrace.families.shapes import ModelShape
from terrace.recipe.schema import Model, Recipe, Stage
from terrace.storage.files import absolute, join, read_file


def family_of(model: Model) -> Family:
    """The family of a recipe's `model`. Raises InputError where `pretrained` holds no configuration."""
    return make_family(model.architecture, configuration(model))


def shape_of(model: Model, vocabulary: int | None = None) -> ModelShape:
    """The shape of the recipe's model; `vocabulary` stands in where its configuration has none."""
    return family_class(model.architecture).shape(configuration(model), vocabulary)


def balance_weight(recipe: Recipe, stage: Stage, config: Mapping[str, Any] | None = None) -> float:
    """Weight of the load-balancing loss of a mixture of experts in a stage: the stage's own, or the configuration's; 0 under other
    objectives, and where the language model stays as it is."""
    if stage.objective != "lm" or stage.train.language is None:
        return 0.0
    if stage.expert_balance is not None:
        return stage.expert_balance
    return family_class(recipe.model.architecture).balance_weight(config if config is not None else configuration(recipe.model))


def configuration(model: Model) -> Mapping[str, Any]:
    """The transformers configuration map of a recipe's model: written out, or config.json of what it starts from; empty
    for a recipe that only looks at data."""
    if model.config is not None or model.pretrained is None:
        return model.config or {}
    return _config_file(absolute(model.pretrained))


def directory_family(directory: str | Path) -> Family:
    """The family of a Hugging Face directory, by its config.json."""
    config = _config_file(str(directory))
    architecture = written_architecture(config)
    if architecture is None:
        raise InputError(f"{directory}: config.json names no model_type")
    return make_family(architecture, config)


@lru_cache(maxsize=16)
def _config_file(directory: str) -> Mapping[str, Any]:
    file = join(directory, "config.json")
    try:
        return json.loads(read_file(file))
    except FileNotFoundError as error:
        raise InputError(
            f"{directory}: no config.json; name a Hugging Face model directory, for example RUN_DIR/stages/NN-name/final"
        ) from error
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}") from error
