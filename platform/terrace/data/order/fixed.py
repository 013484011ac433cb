"""The plan of a stage whose packs hold a fixed number of samples: pairs for two towers, pictures for a self-supervised encoder.

Nothing is fitted together: the samples stand in the order of the mixture, `batch.samples_per_pack` of them in each pack, so
that a step takes exactly `batch.packs * batch.samples_per_pack` samples, one after another in that order. Packs only say how
many samples run through the model at once. A rank takes neighbouring packs of a step: one after another, the ranks' samples
are the step's in order, whatever the number of ranks and the size of packs.

Each sample carries its epoch (passes over its source before this one): with the stage's seed and the sample's name it decides
every mask and every turned or cut picture, on any machine and after any restart.
"""

from __future__ import annotations

from typing import Any

from terrace.data.order.plan import Anchor, StagePlan, Window
from terrace.data.types import PackSpec
from terrace.errors import InputError
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Recipe

PACKS_OF_A_WINDOW = 16  # planned at once


class FixedPlan(StagePlan):
    """`batch.samples_per_pack` samples of one picture each in every pack; the last one may hold fewer."""

    one_picture = True

    def _fingerprint(self, data_seed: int, basis: str) -> str:
        return super()._fingerprint(data_seed, f"{basis}|{self.stage.batch.samples_per_pack} samples of a pack")

    def _check_caps(self) -> None:
        steps, batch = self.stage.budget.steps, self.stage.batch
        allowed = self.interleave.total
        if steps is not None and allowed is not None and allowed < steps * batch.packs * batch.samples_per_pack:
            raise InputError(
                f"stage {self.stage.name}: the budget asks for {steps * batch.packs * batch.samples_per_pack} samples, but"
                f" mixture.epoch_caps leave only {allowed}; raise the caps or lower the budget"
            )

    def deal(self, step: int, world_size: int) -> list[list[PackSpec]]:
        """The packs of a step for each rank: neighbours, so that the ranks' samples in turn are the step's."""
        packs, share = self.packs_of_step(step), self.stage.batch.packs // world_size
        if share * world_size != len(packs):
            raise InputError(
                f"stage {self.stage.name}: batch.packs is {len(packs)}, which cannot be dealt evenly to {world_size} workers; choose a"
                " multiple of the number of workers"
            )
        return [packs[rank * share : (rank + 1) * share] for rank in range(world_size)]

    @property
    def total_packs(self) -> int:
        if self.total_samples is None:
            return super().total_packs
        return -(-self.total_samples // self.stage.batch.samples_per_pack)

    def _packed(self, anchor: Anchor) -> Window | None:
        size = self.stage.batch.samples_per_pack
        stop = anchor.position + PACKS_OF_A_WINDOW * size
        if self.total_samples is not None:
            stop = min(stop, self.total_samples)
        sources, columns = self.stretches[0].columns(anchor.position, stop, self.seed)
        if not len(sources):
            return None
        specs = [
            self._spec(anchor.first_pack + number, members, sources, columns, anchor.window)
            for number, members in enumerate(fixed_groups(len(sources), size))
        ]
        return Window(anchor.window, anchor.first_pack, tuple(specs), anchor.position + len(sources))


def fixed_groups(count: int, size: int) -> list[list[int]]:
    """Numbers 0 to `count` in groups of `size`; the last one may be smaller."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def plan_of(recipe: Recipe, stage_index: int, prepared: Any) -> StagePlan:
    """The plan that the stage's objective wants."""
    fixed = OBJECTIVES[recipe.stages[stage_index].objective].fixed_packs
    return (FixedPlan if fixed else StagePlan).build(recipe, stage_index, prepared)
