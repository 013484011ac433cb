"""Qwen2.5-VL with torch: Qwen2-VL whose tower also wants the boundaries of its windows."""

from __future__ import annotations

from typing import Any

import torch
from transformers.vision_utils import get_vision_window_index

from terrace.models.families.qwen2_vl import Qwen2VLModel


class Qwen25VLModel(Qwen2VLModel):
    def layout(self, grids: torch.Tensor, config: Any, device: torch.device) -> dict[str, Any]:
        index, windows = get_vision_window_index(
            grids, spatial_merge_size=config.spatial_merge_size, window_size=config.window_size, patch_size=config.patch_size
        )
        return super().layout(grids, config, device) | {
            "window_index": index.to(device, non_blocking=True),
            "cu_window_seqlens": windows.to(device, non_blocking=True),
            "max_window_seqlen": int(windows.diff().max()),
        }


MODEL = Qwen25VLModel
