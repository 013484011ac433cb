"""GLM-4.1V with torch: Qwen2-VL's tower call; the convolution that merges patches belongs to the projector."""

from __future__ import annotations

from typing import ClassVar

from terrace.models.families.qwen2_vl import Qwen2VLModel
from terrace.recipe.schema import PartName


class Glm4VModel(Qwen2VLModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (("model.visual.downsample.", "projector"), *Qwen2VLModel.parts)

    def published_name(self, name: str) -> str:
        return name


MODEL = Glm4VModel
