"""Names of families. A recipe's `model.architecture` names one of this folder, or any importable module that holds one.

Such a module has `FAMILY`, the class of the data side, and `MODEL`, what `models.families` takes of it; a built-in
family keeps the two in two files, because a decode task must not import torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import terrace.families as folder
from terrace.errors import InputError
from terrace.families.interface import Family

_SHARED = (
    "interface", "registry", "shapes", "squares", "connector", "checks", "chatml", "tools", "anyres", "siglip_tower", "slicing", "slices",
    "one_tile", "two_towers", "text_encoder", "one_square", "tiles", "configurations", "coordinates", "added",
)  # fmt: skip
_SPELT = {"blip-2": "blip_2", "vision-text-dual-encoder": "vision_text_dual_encoder"}  # model types that are no module's name
# Classes that share their model type with another family's, as config.json names them.
_BY_CLASS = {"Blip2ForImageTextRetrieval": "blip_2_matching"}
_ELSEWHERE: dict[str, str] = {}  # name of a family -> the module outside of this folder that holds it


@lru_cache(maxsize=1)
def built_in() -> tuple[str, ...]:
    """The families of this folder, by file."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folder.__path__) if module.name not in _SHARED))


def family_class(architecture: str) -> type[Family]:
    """The class of a family by its name, or by `package.module`. Raises InputError, with the list, for an unknown one."""
    architecture = _SPELT.get(architecture, architecture)
    if architecture in built_in():
        return importlib.import_module(f"terrace.families.{architecture}").FAMILY
    module = architecture if "." in architecture else _ELSEWHERE.get(architecture)
    if module is None:
        raise InputError(f"model.architecture: unknown family {architecture!r}; there are {', '.join(built_in())}, or name a module")
    try:
        found = importlib.import_module(module).FAMILY
    except Exception as error:  # whatever a module does that is not ours, or a name that none can have
        raise InputError(f"model.architecture: {module} cannot be used as a family: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise InputError(f"model.architecture: {module} cannot be used as a family: its FAMILY is no class of the kind Family")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise InputError(f"model.architecture: {module} cannot be used as a family: {found.__name__} does not say {', '.join(missing)}")
    _ELSEWHERE[found.name] = module
    return found


def written_architecture(config: Mapping[str, Any]) -> str | None:
    """The family that a directory's config.json speaks of."""
    return next((_BY_CLASS[name] for name in config.get("architectures") or () if name in _BY_CLASS), config.get("model_type"))


def family_module(architecture: str, here: str) -> str:
    """The module that holds the other side of a family: `here`.NAME for a built-in one, otherwise the module itself."""
    name = family_class(architecture).name
    return _ELSEWHERE.get(name) or f"{here}.{_SPELT.get(name, name)}"


def make_family(architecture: str, config: Mapping[str, Any]) -> Family:
    """The family for a configuration map."""
    return family_class(architecture).of(config)


def family_values(family: Family) -> dict[str, Any]:
    """A family as plain values, for a manifest."""
    return {"architecture": _ELSEWHERE.get(family.name) or family.name, **asdict(family)}


def stored_family(values: Mapping[str, Any]) -> Family:
    """The family that `family_values` describes."""
    numbers = {name: _hashable(value) for name, value in values.items()}
    return family_class(numbers.pop("architecture"))(**numbers)


def _hashable(value: Any) -> Any:
    """A field as the family had it: JSON has made lists of its tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
