"""Configuration of a model of parts whose tower sees pictures of any size."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_terrace_vlm import TerraceVlmConfig


@strict
class TerraceVlmAnySizeConfig(TerraceVlmConfig):
    """`pictures`: their `layout`, `scale` in pixels and `sides`, `positions` of patches, the place of the `overview`, the `text` around."""

    model_type = "terrace_vlm_any_size"

    pictures: dict[str, Any] | None = None
