"""LLaVA-NeXT with torch: LLaVA whose class joins tiles, drops padding and adds newlines by the picture's own size."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from terrace.models.batch import ImageFacts
from terrace.models.families.llava import LlavaModel
from terrace.recipe.schema import PartName


class LlavaNextModel(LlavaModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (("model.image_newline", "projector"), *LlavaModel.parts)

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        return {**super().inputs(values, images), "image_sizes": images.facts}

    def canonical_name(self, name: str) -> str:
        return "model.image_newline" if name == "image_newline" else super().canonical_name(name)


MODEL = LlavaNextModel
