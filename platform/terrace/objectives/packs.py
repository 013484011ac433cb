"""What objectives share whose examples are packs of a fixed number of samples: each sample weighs one."""

from __future__ import annotations

from terrace.data.order.balance import cost_of
from terrace.data.types import PackedExample
from terrace.objectives.interface import Counts, Objective, Opening, StepExamples
from terrace.objectives.lm import count_packs, empty_pack


class PackObjective(Objective):
    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._cost = cost_of(opening.recipe.model)

    def weight(self, example: PackedExample) -> float:
        return len(example.sample_ids)

    def count(self, taken: StepExamples) -> Counts:
        return count_packs(taken.examples, sorted(self.opening.stage.mixture.weights), self._cost)

    def pack_of(self, example: PackedExample) -> PackedExample:
        return example

    def empty(self) -> PackedExample:
        return empty_pack()
