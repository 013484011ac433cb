"""Idefics3 with torch: a SigLIP tower over tiles, pixel shuffle and one matrix, names of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from terrace.models.batch import ImageFacts
from terrace.models.families.interface import FamilyModel
from terrace.recipe.schema import PartName


class Idefics3Model(FamilyModel):
    """The tower is left with transformers' attention, because it makes a mask; a tile of zeros would be taken for padding."""

    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (
        ("model.vision_model.", "vision"), ("model.connector.", "projector"), ("model.text_model.", "language"), ("lm_head.", "language"),
    )  # fmt: skip
    blocks: ClassVar[Mapping[PartName, str]] = {"vision": "model.vision_model.encoder.layers", "language": "model.text_model.layers"}
    embedding: ClassVar[str] = "model.text_model.embed_tokens.weight"
    published: ClassVar[Sequence[tuple[str, str]]] = (
        ("vision_model.", "model.vision_model."), ("connector.", "model.connector."), ("text_model.", "model.text_model."),
        ("model.", "model.text_model."),
    )  # fmt: skip
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    blank_value: ClassVar[float] = -1.0

    def vision(self, model: Any) -> Any:
        return model.model.vision_model

    def language(self, model: Any) -> Any:
        return model.model.text_model

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        return {"pixel_values": super().inputs(values, images)["pixel_values"][None]}


MODEL = Idefics3Model
