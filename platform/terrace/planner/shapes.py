"""The shape of a recipe's model, without torch: what parameters, FLOPs and memory are computed from.

The shape of a recipe that names a pretrained model is read from that directory's config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from terrace.data.family import shape_of
from terrace.errors import InputError, TerraceError
from terrace.families.registry import family_class
from terrace.families.shapes import ModelShape
from terrace.recipe.schema import Recipe, Stage


def model_shape(recipe: Recipe) -> ModelShape:
    """The shape of the recipe's model. Raises InputError where its configuration cannot be read or lacks a field."""
    try:
        return shape_of(recipe.model, recipe.tokenizer.train_vocabulary_size)
    except KeyError as error:
        raise InputError(f"model: the configuration lacks {error}, which the plan needs") from error
    except TerraceError as error:
        raise InputError(
            f"model.pretrained: {error}; the plan needs the model's shape: copy its config.json to a local directory of that "
            "layout or write its fields under model.config"
        ) from error


def stage_shape(recipe: Recipe, stage: Stage) -> ModelShape:
    """The same as the stage's pictures make it: of those that have as many tokens whatever their size, smaller ones have fewer patches."""
    shape = model_shape(recipe)
    vision = shape.vision
    if not vision.tokens_per_picture or vision.tile_patches is None:
        return shape
    patches = max(1, min(vision.tile_patches, stage.pixels.max // (vision.patch_values // 3)))
    return replace(shape, vision=replace(vision, tile_patches=patches, patches_per_token=patches / vision.tokens_per_picture))


def shape_of_config(config: Mapping[str, Any], architecture: str, vocabulary: int | None = None) -> ModelShape:
    """The shape of a transformers configuration map; `vocabulary` is used where the configuration has none."""
    return family_class(architecture).shape(config, vocabulary)
