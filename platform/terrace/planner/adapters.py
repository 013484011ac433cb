"""What low-rank adapters add to a model's shape. Which layers a stage adapts is asked of the model itself, on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from terrace.families.shapes import AdapterShape, ModelShape
from terrace.recipe.schema import PARTS, Model, Stage


def with_adapters(shape: ModelShape, stage: Stage, model: Model, config: Any | None = None) -> ModelShape:
    """The shape of a stage: that of the model, and its adapters where the stage has any. Only then is the model built (without
    memory, from `config` or the recipe's own). Raises InputError for a target that no layer has."""
    if not any((training := getattr(stage.train, part)) is not None and training.lora is not None for part in PARTS):
        return shape
    from terrace.models.build import meta_model, model_config
    from terrace.models.families.registry import family_of_model
    from terrace.models.lora import lora_targets

    built = meta_model(config if config is not None else model_config(model))
    family, found = family_of_model(built), {}
    for name, lora in lora_targets(built, stage).items():
        layer, part = built.get_submodule(name), family.part_of(f"{name}.weight")
        own = AdapterShape(
            parameters=lora.rank * (layer.in_features + layer.out_features), ranks=lora.rank,
            dropped=layer.in_features if lora.dropout else 0,
        )
        found[part] = found[part].plus(own) if part in found else own
    return replace(shape, adapters=found)
