"""InternVL with torch: a tower of fixed tiles, pixel shuffle inside `get_image_features`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from terrace.models.families.interface import FamilyModel
from terrace.recipe.schema import PartName


class InternVLModel(FamilyModel):
    blocks: ClassVar[Mapping[PartName, str]] = {
        "vision": "model.vision_tower.encoder.layer", "language": "model.language_model.layers"
    }  # fmt: skip
    mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)

    def unused(self, config: Any, names: Iterable[str]) -> list[str]:
        """The mask token stands for patches that pre-training hides."""
        return [name for name in names if name == "model.vision_tower.embeddings.mask_token"]


MODEL = InternVLModel
