"""SigLIP with torch: temperature and bias start as published (log 10 and -10), not at transformers' zeros."""

from __future__ import annotations

import math
from typing import Any

import torch

from terrace.families.siglip import Siglip
from terrace.models.families.two_towers import TwoTowersModel

START = {"logit_scale": math.log(10.0), "logit_bias": -10.0}


class SiglipModel(TwoTowersModel):
    mean = Siglip.mean
    std = Siglip.std
    pads_to_context = True

    def initial(self, name: str, config: Any, shape: torch.Size) -> torch.Tensor | None:
        return torch.full(shape, START[name]) if name in START else None


MODEL = SiglipModel
