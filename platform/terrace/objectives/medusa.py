"""Medusa: heads that read the model's hidden state, each for a token further ahead, beside a model that trains or is frozen."""

from __future__ import annotations

from typing import Any

import torch

from terrace.models.batch import DeviceBatch
from terrace.objectives.heads import Ahead, HeadsObjective, ahead
from terrace.objectives.interface import Opening
from terrace.recipe.schema_heads import MedusaOptions


class Medusa(HeadsObjective):
    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._options = opening.stage.medusa or MedusaOptions()

    def weights(self) -> list[float]:
        return [self._options.decay**number for number in range(1, self._options.heads + 1)]

    def outputs(self, model: Any, batch: DeviceBatch, hidden: torch.Tensor) -> list[tuple[Ahead, torch.Tensor, Any]]:
        found = []
        for number, (block, layer) in enumerate(zip(model.heads.blocks, model.heads.lm_heads), 1):
            what = ahead(batch, number)
            found.append((what, block(hidden.index_select(0, what.rows)), layer))
        return found


open_objective = Medusa
