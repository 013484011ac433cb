"""Gemma 3 with torch: the placeholders of each image are a group whose tokens see each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from terrace.models.batch import DeviceBatch
from terrace.models.families.interface import FamilyModel


class Gemma3Model(FamilyModel):
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def groups(self, model: Any, batch: DeviceBatch, attention: Mapping[str, Any]) -> np.ndarray:
        is_image = batch.example.input_ids == model.config.image_token_id
        starts = is_image & ~np.concatenate([[False], is_image[:-1]]) if len(is_image) else is_image
        return np.where(is_image, np.cumsum(starts) - 1, -1)


MODEL = Gemma3Model
