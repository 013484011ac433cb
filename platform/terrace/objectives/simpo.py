"""Simple preference optimisation: -log sigmoid of the difference of mean log-probabilities per token less a margin, without a reference."""

from __future__ import annotations

import torch

from terrace.objectives.interface import Opening
from terrace.objectives.preference import Preference, Scored
from terrace.objectives.preference_losses import simpo_losses
from terrace.recipe.schema_preference import SimpoOptions


class Simpo(Preference):
    with_reference = False

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._options = opening.stage.simpo or SimpoOptions()
        self.sft_weight = self._options.sft_weight

    def losses(self, scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
        options, means = self._options, scored.logprobs / scored.tokens
        return simpo_losses(*scored.pairs(means), options.beta, options.gamma, options.label_smoothing), options.beta * means


open_objective = Simpo
