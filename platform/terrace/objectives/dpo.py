"""Direct preference optimisation: -log sigmoid(beta ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected))), or IPO's square."""

from __future__ import annotations

import torch

from terrace.objectives.interface import Opening
from terrace.objectives.preference import Preference, Scored
from terrace.objectives.preference_losses import dpo_losses, ipo_losses, robust_losses
from terrace.recipe.schema_preference import DpoOptions


class Dpo(Preference):
    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._options = opening.stage.dpo or DpoOptions()
        self.with_reference = not self._options.reference_free
        self.sft_weight = self._options.sft_weight

    def losses(self, scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
        options, (chosen, rejected) = self._options, scored.pairs(scored.ratios)
        if options.loss == "ipo":
            found = ipo_losses(*scored.pairs(scored.ratios / scored.tokens), options.beta)
        elif options.loss == "robust":
            found = robust_losses(chosen, rejected, options.beta, options.label_smoothing)
        else:
            found = dpo_losses(chosen, rejected, options.beta, options.label_smoothing)
        return found, options.beta * scored.ratios


open_objective = Dpo
