"""CLIP with torch: a class token before the patches, a linear map behind each tower."""

from __future__ import annotations

from typing import Any

import torch

from terrace.families.clip import Clip
from terrace.models.families.two_towers import TwoTowersModel


class ClipModel(TwoTowersModel):
    mean = Clip.mean
    std = Clip.std
    first_patches = 1

    def initial(self, name: str, config: Any, shape: torch.Size) -> torch.Tensor | None:
        """The class token's, positions' and maps' own initialisation stand in the class; the temperature stands in the configuration."""
        if name == "logit_scale":
            return torch.full(shape, float(config.logit_scale_init_value))
        return None


MODEL = ClipModel
