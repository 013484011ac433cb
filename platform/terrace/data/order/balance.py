"""Deal the packs of a global batch to ranks: the same number each, nearly the same cost.

Full packs have equal tokens and unequal work: attention grows with the square of a segment, the vision tower with its
patches. A step lasts as long as its slowest rank, so the largest packs go first, each to the rank with the least work
that still has room (longest processing time first), and then the slowest rank exchanges packs while that helps: 64 packs
on 8 ranks come to 1.001 of the mean where dealing in order gives 1.23. The cost is counted in multiply-adds of the
forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from terrace.data.family import configuration, family_of, shape_of
from terrace.data.types import PackSpec
from terrace.families.shapes import ModelShape
from terrace.recipe.schema import Model

TYPICAL_PATCHES = 1024  # that a patch attends to, of an image whose tower has no windows


@dataclass(frozen=True)
class CostModel:
    """Multiply-adds of a forward pass per token, per squared token of a segment, and per row of pixels.

    The defaults, for data that is looked at without a model, are those of Qwen2.5-VL-7B.
    """

    per_token: float = 7.07e9
    per_token_pair: float = 28 * 3584.0  # causal: half of 2 * layers * width
    per_row: float = 0.66e9

    def cost(self, pack: PackSpec) -> float:
        pairs = sum(length * length for length in pack.lengths)
        return self.per_token * sum(pack.lengths) + self.per_token_pair * pairs + self.per_row * pack.pixel_rows


def cost_model(shape: ModelShape, patches_per_row: int = 1) -> CostModel:
    """The cost model of a shape. A row of pixels holds `patches_per_row` patches: one, or all of a tile."""
    text, vision = shape.language, shape.vision
    matrices = 3 if text.gated else 2
    per_layer = 2 * text.width * (text.query_width + text.key_width) + matrices * text.width * text.intermediate
    per_token = text.layers * per_layer + text.width * text.vocabulary
    seen = vision.window**2 if vision.window else patches_per_row if patches_per_row > 1 else TYPICAL_PATCHES
    products = 3 if vision.gated else 2
    per_patch = vision.depth * (4 * vision.width**2 + products * vision.width * vision.intermediate + 2 * seen * vision.width)
    return CostModel(float(per_token), float(text.layers * text.query_width), float(patches_per_row * per_patch))


def cost_of(model: Model) -> CostModel:
    """What packs cost the recipe's model; the nominal costs where it has an empty configuration, as when data is only looked at."""
    if not configuration(model):
        return CostModel()
    family = family_of(model)
    smallest = family.view(1, 1, (1, 1))
    patches = sum(rows * columns for rows, columns in family.tower_pictures(smallest.facts))
    return cost_model(shape_of(model), patches // smallest.rows)


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Numbers of the packs that each rank gets, in ascending order: equal counts, balanced cost.

    `len(costs)` must be a multiple of `ranks`. Deterministic: ties go to the lower number and the lower rank.
    """
    if len(costs) % ranks:
        raise ValueError(f"{len(costs)} packs cannot be dealt evenly to {ranks} ranks")
    share = len(costs) // ranks
    loads = [0.0] * ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for pack in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        rank = min((r for r in range(ranks) if len(hands[r]) < share), key=lambda r: (loads[r], r))
        hands[rank].append(pack)
        loads[rank] += costs[pack]
    for _ in range(2 * ranks):
        if not _swap(hands, loads, costs):
            break
    return [sorted(hand) for hand in hands]


def _swap(hands: list[list[int]], loads: list[float], costs: Sequence[float]) -> bool:
    """Exchange one pack of the slowest rank for a lighter one elsewhere, where that lowers the higher of the two loads."""
    slowest = max(range(len(loads)), key=lambda rank: (loads[rank], -rank))
    own = np.asarray([costs[pack] for pack in hands[slowest]])
    best, found = loads[slowest] * (1 - 1e-9), None
    for rank, hand in enumerate(hands):
        if rank == slowest:
            continue
        moved = own[:, None] - np.asarray([costs[pack] for pack in hand])[None, :]
        higher = np.maximum(loads[slowest] - moved, loads[rank] + moved)
        place = int(np.argmin(higher))
        if higher.flat[place] < best:
            best, found = float(higher.flat[place]), (rank, *divmod(place, len(hand)))
    if found is None:
        return False
    rank, mine, theirs = found
    moved = costs[hands[slowest][mine]] - costs[hands[rank][theirs]]
    hands[slowest][mine], hands[rank][theirs] = hands[rank][theirs], hands[slowest][mine]
    loads[slowest] -= moved
    loads[rank] += moved
    return True


def deal_in_order(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The plain way to compare with: pack i goes to rank i modulo ranks."""
    return [list(range(rank, len(costs), ranks)) for rank in range(ranks)]


def max_over_mean(costs: Sequence[float], hands: Sequence[Sequence[int]]) -> float:
    """How much longer than the average rank the slowest one works; 1.0 is perfect, and 1.0 for a batch without work."""
    loads = [sum(costs[pack] for pack in hand) for hand in hands]
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean > 0 else 1.0
