"""The torch side of a family, for a transformers configuration or model."""

from __future__ import annotations

import importlib
from typing import Any

from terrace.families.registry import family_class, family_module
from terrace.models.families.interface import FamilyModel


def family_model(config: Any, architecture: str | None = None) -> FamilyModel:
    """`architecture` is needed once in a process for a family that lies outside of this package; its model type will do afterwards."""
    name = architecture or config.model_type
    module = importlib.import_module(family_module(name, "terrace.models.families"))
    return module.MODEL(family_class(name).of(config.to_dict()))


def family_model_named(architecture: str) -> FamilyModel:
    """The family where its names alone are wanted, without a configuration's numbers."""
    module = importlib.import_module(family_module(architecture, "terrace.models.families"))
    return module.MODEL(family_class(architecture).of({}))


def family_of_model(model: Any) -> FamilyModel:
    """The family of a transformers model; made once and kept with it."""
    found = model.__dict__.get("_terrace_family")
    if found is None:
        found = model.__dict__["_terrace_family"] = family_model(model.config)
    return found


def output_layer(model: Any) -> Any:
    """The layer that gives logits, wherever the class keeps it."""
    return model.get_submodule(family_of_model(model).head.removesuffix(".weight"))
