"""Mistral 3 with torch: pictures of different sizes side by side, padded below and to the right, as the Pixtral tower takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from terrace.models.batch import ImageFacts
from terrace.models.families.interface import FamilyModel, Features
from terrace.recipe.schema import PartName


class Mistral3Model(FamilyModel):
    blocks: ClassVar[Mapping[PartName, str]] = {
        "vision": "model.vision_tower.transformer.layers", "language": "model.language_model.layers"
    }  # fmt: skip
    tower_attention: ClassVar[str] = "segments"

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        patch, sizes = self.family.patch, images.facts.tolist()
        padded = values.new_zeros(len(sizes), 3, max(rows for rows, _ in sizes) * patch, max(columns for _, columns in sizes) * patch)
        for place, ((rows, columns), part) in enumerate(zip(sizes, values.split(images.rows.tolist()))):
            whole = part.view(rows, columns, 3, patch, patch).permute(2, 0, 3, 1, 4).reshape(3, rows * patch, columns * patch)
            padded[place, :, : rows * patch, : columns * patch] = whole
        return {"pixel_values": padded, "image_sizes": [(rows * patch, columns * patch) for rows, columns in sizes]}

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        """Tower and projector in turn: the class splits by image afterwards, for which it waits for the device."""
        given = self.inputs(values, images)
        hidden = model.model.vision_tower(**given, return_dict=True).last_hidden_state
        return Features(model.model.multi_modal_projector(hidden.squeeze(0), given["image_sizes"]))


MODEL = Mistral3Model
