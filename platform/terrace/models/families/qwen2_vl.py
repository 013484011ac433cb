"""Qwen2-VL with torch: patches of two frames, one call of the tower for images and videos, boundaries computed on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from terrace.families.qwen2_vl import TEMPORAL_PATCH_SIZE
from terrace.models.batch import ImageFacts
from terrace.models.families.interface import FamilyModel, Features
from terrace.recipe.schema import PartName


class Qwen2VLModel(FamilyModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (
        ("model.visual.merger.", "projector"),
        ("model.visual.", "vision"),
        ("model.language_model.", "language"),
        ("lm_head.", "language"),
    )
    blocks: ClassVar[Mapping[PartName, str]] = {"vision": "model.visual.blocks", "language": "model.language_model.layers"}
    tower_attention: ClassVar[str] = "segments"

    def canonical_name(self, name: str) -> str:
        """Older checkpoints on the hub spell the same tensors `visual.…` and `model.layers.…`."""
        if name.startswith(("model.visual.", "model.language_model.", "lm_head.")):
            return name
        if name.startswith("visual."):
            return "model." + name
        if name.startswith("language_model.lm_head."):
            return name.removeprefix("language_model.")
        if name.startswith("language_model.model."):
            return "model.language_model." + name.removeprefix("language_model.model.")
        if name.startswith("model."):
            return "model.language_model." + name.removeprefix("model.")
        return name

    def published_name(self, name: str) -> str:
        if name.startswith("model.visual."):
            return name.removeprefix("model.")
        if name.startswith("model.language_model."):
            return "model." + name.removeprefix("model.language_model.")
        return name

    def vision(self, model: Any) -> Any:
        return model.model.visual

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        """Patches [P, 3 * 2 * values]: a still image fills both frames in time, a video has a row for each."""
        patches = images.facts.prod(dim=1)
        if bool((images.rows == patches).all()):
            doubled = values.unsqueeze(2).expand(-1, -1, TEMPORAL_PATCH_SIZE, -1)
        else:
            frames = (torch.from_numpy(rows).to(values.device, non_blocking=True) for rows in _frame_rows(images, patches))
            doubled = torch.stack([values[rows] for rows in frames], dim=2)
        return {"pixel_values": doubled.reshape(len(doubled), -1), "image_grid_thw": images.facts}

    def layout(self, grids: torch.Tensor, config: Any, device: torch.device) -> dict[str, Any]:
        """Everything the tower derives from the grids int64 [I, 3], computed on the host and copied once.

        transformers would compute the same on the device and wait for it several times.
        """
        images = get_vision_cu_seqlens(grids)
        return {
            "position_ids": get_vision_position_ids(grids, config.spatial_merge_size).to(device, non_blocking=True),
            "cu_seqlens": images.to(device, non_blocking=True),
            "max_seqlen": int(images.diff().max()),
        }

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        tower = self.vision(model)
        inputs, device = self.inputs(values, images), values.device
        layout = self.layout(images.facts, tower.config, device)
        output = tower(inputs["pixel_values"], grid_thw=images.facts.to(device), **layout)
        return Features(output.pooler_output, tuple(getattr(output, "deepstack_features", None) or ()))

    def places(self, input_ids: torch.Tensor, config: Any) -> torch.Tensor:
        return (input_ids == config.image_token_id) | (input_ids == config.video_token_id)

    def visual_ids(self, config: Any) -> tuple[int, ...]:
        return config.image_token_id, config.video_token_id

    def compute_dtype(self, model: Any) -> torch.dtype:
        return next(model.model.visual.patch_embed.parameters()).dtype


def _frame_rows(images: ImageFacts, patches: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows of pixels that hold the first and the second frame of each patch, int64 [P] each."""
    first, second, start = [], [], 0
    for count, held in zip(patches.tolist(), images.rows.tolist()):
        frames = held // count
        rows = start + frames * np.arange(count)
        first.append(rows)
        second.append(rows + frames - 1)
        start += held
    return np.concatenate(first), np.concatenate(second)


MODEL = Qwen2VLModel
