"""PaliGemma with torch: image and question of each sample are a group whose tokens see each other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from terrace.models.batch import DeviceBatch
from terrace.models.families.interface import FamilyModel


class PaliGemmaModel(FamilyModel):
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def groups(self, model: Any, batch: DeviceBatch, attention: Mapping[str, Any]) -> np.ndarray:
        """The prompts of units; else each sample up to the token that predicts the first one that is learned."""
        example = batch.example
        found = np.full(example.tokens, -1, np.int64)
        if attention.get("prompt_units") is not None:
            for number, unit in enumerate(attention["prompt_units"]):
                found[unit.start : unit.start + unit.prompt] = number
            return found
        for number, (start, end) in enumerate(itertools.pairwise([0, *example.segment_ends.tolist()])):
            learned = np.flatnonzero(example.targets[start:end] >= 0)
            found[start : start + learned[0] + 1 if len(learned) else end] = number
        return found


MODEL = PaliGemmaModel
