"""Qwen3-VL with torch: features of some tower blocks are added behind the first language layers (deepstack)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from terrace.families.qwen3_vl import Qwen3VL
from terrace.models.families.interface import Features
from terrace.models.families.qwen2_vl import Qwen2VLModel
from terrace.recipe.schema import PartName


class Qwen3VLModel(Qwen2VLModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (
        ("model.visual.deepstack_merger_list.", "projector"), *Qwen2VLModel.parts
    )  # fmt: skip
    mean = Qwen3VL.mean
    std = Qwen3VL.std

    def published_name(self, name: str) -> str:
        return name

    def layout(self, grids: torch.Tensor, config: Any, device: torch.device) -> dict[str, Any]:
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=int(config.num_position_embeddings**0.5), mode="bilinear", align_corners=True,
            spatial_merge_size=config.spatial_merge_size,
        )  # fmt: skip
        return super().layout(grids, config, device) | {
            "interp_indices": indices.to(device, non_blocking=True), "interp_weights": weights.to(device, non_blocking=True)
        }  # fmt: skip

    def language_inputs(self, features: Features, places: torch.Tensor) -> dict[str, Any]:
        return {"visual_pos_masks": places, "deepstack_visual_embeds": list(features.deep)}


MODEL = Qwen3VLModel
