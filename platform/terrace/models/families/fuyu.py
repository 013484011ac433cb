"""Fuyu with torch: the matrix that embeds patches is the projector, and there is nothing before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from terrace.models.batch import ImageFacts
from terrace.models.families.interface import FamilyModel, Features
from terrace.recipe.schema import PartName


class FuyuModel(FamilyModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (
        ("model.vision_embed_tokens.", "projector"), ("model.language_model.", "language"), ("lm_head.", "language"),
    )  # fmt: skip
    blocks: ClassVar[Mapping[PartName, str]] = {"language": "model.language_model.layers"}
    published: ClassVar[Sequence[tuple[str, str]]] = (
        ("vision_embed_tokens.", "model.vision_embed_tokens."), ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."), ("model.", "model.language_model."),
    )  # fmt: skip
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    def vision(self, model: Any) -> Any:
        """What takes pixels."""
        return model.model.vision_embed_tokens

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        return {"pixel_values": values.transpose(1, 2).reshape(1, len(values), -1)}  # colours last

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        return Features(model.model.get_image_features(**self.inputs(values, images), return_dict=True).last_hidden_state[0])


MODEL = FuyuModel
