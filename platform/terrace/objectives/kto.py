"""Kahneman-Tversky optimisation: single answers, each wanted or not, against the divergence z of the policy from the reference.

    z = max(0, mean over the global batch of (log p - log p_ref)(answer to another prompt)), without gradient

Which other answer a prompt is measured with is fixed (the next row of its source), so its reference is computed once like every other.
The pass that measures z has no gradient and runs before the step's first backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from terrace.objectives.answers import AnswerPack
from terrace.objectives.interface import Opening
from terrace.objectives.preference import Preference, Scored
from terrace.objectives.preference_losses import kto_losses
from terrace.recipe.schema_preference import KtoOptions


class Kto(Preference):
    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._options = opening.stage.kto or KtoOptions()
        self._divergence = 0.0

    def weight(self, example: AnswerPack) -> float:
        """Answers."""
        return len(example.lengths)

    def before(self, examples: Sequence[AnswerPack], scale: float) -> None:
        super().before(examples, scale)
        assert self._table is not None
        total, count = 0.0, 0
        for example in examples:
            pack = example.mismatched or self.empty()
            found = self._measured(pack) - self._table.of_mismatched(pack)
            total, count = total + float(found.sum()), count + len(found)
        whole = self.opening.gather([total, float(count)]).sum(axis=0)
        self._divergence = max(0.0, float(whole[0]) / max(1.0, float(whole[1])))

    def losses(self, scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
        options = self._options
        found = kto_losses(
            scored.ratios, scored.wanted, self._divergence, options.beta, options.desirable_weight, options.undesirable_weight
        )
        return found, options.beta * (scored.ratios - self._divergence)

    def margins(self, rewards: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Of each answer: its reward beyond z where it is wanted, what it lacks where not."""
        return torch.where(wanted, rewards, -rewards)

    def values(self, ran: bool) -> dict[str, Any]:
        return super().values(ran) | ({"divergence": self._divergence} if ran else {})


open_objective = Kto
