"""MiniCPM-V with torch: every slice is a picture of its own size for the tower, which is told the sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from terrace.models.batch import ImageFacts
from terrace.models.families.interface import FamilyModel, Features
from terrace.recipe.schema import PartName


class MiniCPMVModel(FamilyModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (
        ("model.vision_tower.", "vision"), ("model.merger.", "projector"), ("model.language_model.", "language"), ("lm_head.", "language"),
    )  # fmt: skip
    tower_attention: ClassVar[str] = "segments"
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        return patches_side_by_side(self.family, values, images)

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        """The tower, then its merger over all pictures as one.

        The class runs the merger once for each picture, which under ZeRO-3 is a different number of collectives on each rank.
        """
        given = self.inputs(values, images)
        hidden = model.model.vision_tower(**given, return_dict=True).last_hidden_state
        order = torch.from_numpy(windows_in_rows((given["target_sizes"] // 2).tolist())).to(hidden.device, non_blocking=True)
        [pooled] = model.model.merger(hidden[:, order], torch.tensor([[2, len(order) // 2]]))
        return Features(pooled)


def patches_side_by_side(family: Any, values: torch.Tensor, images: ImageFacts) -> dict[str, torch.Tensor]:
    """Normalised patches [R, 3, values / 3] as `pixel_values` [1, 3, patch, patch * R], and `target_sizes` (rows, columns) of pictures."""
    patch = family.patch
    sizes = [size for facts in images.facts.tolist() for size in family.tower_pictures(facts)]
    rows = values.view(-1, 3, patch, patch).permute(1, 2, 0, 3).reshape(1, 3, patch, -1)
    return {"pixel_values": rows, "target_sizes": torch.tensor(sizes, dtype=torch.int32)}


def windows_in_rows(sizes: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 [P]: cells of pictures (rows, columns) so that all their 2 x 2 windows stand side by side, as a picture of two rows."""
    upper, lower, start = [], [], 0
    for rows, columns in sizes:
        cells = np.arange(start, start + rows * columns).reshape(rows, columns)
        upper.append(cells[0::2].reshape(-1))
        lower.append(cells[1::2].reshape(-1))
        start += rows * columns
    return np.concatenate([*upper, *lower])


MODEL = MiniCPMVModel
