"""Where a configuration, transformers' own or a map, keeps the language model's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def language_config(config: Any) -> Any:
    """The language model's part of the whole configuration; of a flat one (Chameleon, Idefics) that itself."""
    if isinstance(config, Mapping):
        return config.get("text_config") or config
    return getattr(config, "text_config", None) or config


def vision_config(config: Any) -> Any:
    """The tower's part of a transformers configuration; of an encoder of pictures alone that itself."""
    return getattr(config, "vision_config", None) or config
