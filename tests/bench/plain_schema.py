"""The recipe's schema where pydantic is not installed: defaults and nesting as pydantic makes them, but no checks.

For the GPU script alone, whose recipe is written in this repository: a machine lent for an hour often has torch and
transformers and no way to install anything. Import it before `terrace.recipe.schema`.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

REQUIRED = object()


class _Before:
    """A validator of mode `before`, which turns a short form into the long one."""

    def __init__(self, function: Any) -> None:
        self.function = function.__func__ if isinstance(function, classmethod) else function


def _field(default: Any = REQUIRED, **_: Any) -> Any:
    return default


class _After:
    """A validator of mode `after`, which looks at what was read and refuses it or gives it back."""

    def __init__(self, function: Any) -> None:
        self.function = function


def _validator(mode: str) -> Callable[[Any], Any]:
    kinds = {"before": _Before, "after": _After}
    if mode not in kinds:
        raise NotImplementedError(f"a validator of mode {mode}: install pydantic")
    return kinds[mode]


class _Model:
    """The part of BaseModel that reading a recipe uses."""

    def __init__(self, **values: Any) -> None:
        hints = typing.get_type_hints(type(self))
        hints.pop("model_config", None)
        if unknown := set(values) - set(hints):
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        for name, hint in hints.items():
            if name.startswith("_"):  # a PrivateAttr, which no map gives
                object.__setattr__(self, name, getattr(type(self), name, None))
                continue
            value = values.get(name, getattr(type(self), name, REQUIRED))
            if value is REQUIRED:
                raise TypeError(f"{type(self).__name__} needs {name}")
            object.__setattr__(self, name, _converted(value, hint) if name in values else copy.deepcopy(value))
        for validator in [one for owner in type(self).__mro__ for one in vars(owner).values() if isinstance(one, _After)]:
            validator.function(self)

    @classmethod
    def model_validate(cls, value: Any) -> Any:
        for owner in cls.__mro__:
            for validator in vars(owner).values():
                if isinstance(validator, _Before):
                    value = validator.function(cls, value)
        return value if isinstance(value, cls) else cls(**value)

    def model_copy(self, update: dict[str, Any]) -> Any:
        return type(self)(**{**vars(self), **update})


def _converted(value: Any, hint: Any) -> Any:
    """`value` with maps turned into models, wherever the type says so."""
    arguments = typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, _Model):
        return hint.model_validate(value)
    if isinstance(value, list) and typing.get_origin(hint) is list:
        return [_converted(item, arguments[0]) for item in value]
    if isinstance(value, dict) and typing.get_origin(hint) is dict:
        return {key: _converted(item, arguments[1]) for key, item in value.items()}
    if value is not None and typing.get_origin(hint) in (typing.Union, types.UnionType):
        models = [option for option in arguments if isinstance(option, type) and issubclass(option, _Model)]
        return _converted(value, models[0]) if models and isinstance(value, dict) else value
    return value


def stand_in_where_missing() -> bool:
    """Put the stand-in where `import pydantic` finds it, unless pydantic is there. Returns whether it was needed."""
    try:
        if importlib.util.find_spec("pydantic") is not None:
            return False
    except ValueError:  # named as absent in sys.modules
        pass
    module = types.ModuleType("pydantic")
    module.BaseModel, module.ConfigDict, module.Field, module.model_validator = _Model, dict, _field, _validator  # type: ignore[attr-defined]
    module.ValidationError = ValueError  # type: ignore[attr-defined]
    module.PrivateAttr = _field  # type: ignore[attr-defined]
    module.WrapValidator = lambda check: check  # type: ignore[attr-defined]
    sys.modules["pydantic"] = module
    return True
