"""Odds-ratio preference optimisation: the chosen answer's likelihood, and the odds of chosen against rejected, without a reference."""

from __future__ import annotations

import torch

from terrace.objectives.interface import Opening
from terrace.objectives.preference import Preference, Scored
from terrace.objectives.preference_losses import orpo_losses
from terrace.recipe.schema_preference import OrpoOptions


class Orpo(Preference):
    with_reference = False
    sft_weight = 1.0

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._options = opening.stage.orpo or OrpoOptions()

    def losses(self, scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
        means = scored.logprobs / scored.tokens
        return orpo_losses(*scored.pairs(means), self._options.beta), self._options.beta * means


open_objective = Orpo
