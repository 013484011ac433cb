"""Mixed preference optimisation: dpo's loss of the pair, a classifier's of each answer, and the chosen one's likelihood, weighted."""

from __future__ import annotations

import torch

from terrace.objectives.interface import Opening
from terrace.objectives.preference import Preference, Scored
from terrace.objectives.preference_losses import bco_losses, dpo_losses
from terrace.recipe.schema_preference import MpoOptions


class Mpo(Preference):
    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._options = opening.stage.mpo or MpoOptions()
        self.sft_weight = self._options.generation_weight

    def losses(self, scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
        options, (chosen, rejected) = self._options, scored.pairs(scored.ratios)
        found = options.preference_weight * dpo_losses(chosen, rejected, options.beta)
        return found + options.quality_weight * bco_losses(chosen, rejected, options.beta), options.beta * scored.ratios


open_objective = Mpo
