"""What of a part a stage trains, where that is not all of it: low-rank adapters, or only some tensors. Which layers and tensors those
are is asked of the model itself, on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from terrace.errors import InputError
from terrace.families.shapes import AdapterShape, ModelShape
from terrace.recipe.schema import PARTS, Model, Stage


def with_adapters(shape: ModelShape, stage: Stage, model: Model, config: Any | None = None) -> ModelShape:
    """The shape of a stage: that of the model, with its adapters, or what it trains of a part where that is not all. Only then is the
    model built (without memory, from `config` or the recipe's own). Raises InputError for a name that no layer or tensor has."""
    special = [training for part in PARTS if (training := getattr(stage.train, part)) is not None and (training.lora or training.only)]
    if not special:
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
    return replace(shape, adapters=found, partly=_partly(built, stage))


def _partly(model: Any, stage: Stage) -> dict[str, int]:
    from terrace.models.families.registry import family_of_model
    from terrace.models.parts import has_words

    family = family_of_model(model)
    names, counts = dict(model.named_parameters()), {}
    unused = set(family.unused(model.config, names))
    for part in PARTS:
        training = getattr(stage.train, part)
        if training is None or not training.only:
            continue
        own = [name for name in names if family.part_of(name) == part and name not in unused and has_words(name, training.only)]
        counts[part] = sum(names[name].numel() for name in own)
        if not counts[part]:
            raise InputError(f"stage {stage.name}: train.{part}.only: no tensor of {part} has {', '.join(training.only)} in its name")
    return counts
