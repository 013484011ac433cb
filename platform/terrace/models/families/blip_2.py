"""BLIP-2 with torch: the class has no inner model, and its own forward would hide the boundaries of samples behind a mask of ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD
from terrace.models.batch import ImageFacts
from terrace.models.families.interface import FamilyModel, Features
from terrace.recipe.schema import PartName


class Blip2Model(FamilyModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (
        ("vision_model.", "vision"),
        ("qformer.", "projector"),
        ("query_tokens", "projector"),
        ("language_projection.", "projector"),
        ("language_model.", "language"),
    )
    blocks: ClassVar[Mapping[PartName, str]] = {
        "vision": "vision_model.encoder.layers", "language": "language_model.model.decoder.layers"
    }  # fmt: skip
    embedding: ClassVar[str] = "language_model.model.decoder.embed_tokens.weight"
    head: ClassVar[str] = "language_model.lm_head.weight"
    mean = IMAGE_MEAN
    std = IMAGE_STD

    def canonical_name(self, name: str) -> str:
        return name

    def initial(self, name: str, config: Any, shape: torch.Size) -> torch.Tensor | None:
        """The class starts all queries at zero: equal, they would stay equal. The published code draws them."""
        if name != "query_tokens":
            return None
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * config.qformer_config.initializer_range

    def may_be_new(self, name: str) -> bool:
        return name.startswith("language_projection.")  # after the first stage there is none

    def vision(self, model: Any) -> Any:
        return model.vision_model

    def language(self, model: Any) -> Any:
        return model.language_model.model.decoder

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        return Features(model.get_image_features(**self.inputs(values, images), return_dict=True).pooler_output.flatten(0, 1))


MODEL = Blip2Model
