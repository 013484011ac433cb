"""Deal the packs of a global batch to ranks: the same number each, nearly the same cost.

Full packs have equal tokens and unequal work: attention grows with the square of a segment, the vision tower with its
patches. A step lasts as long as its slowest rank, so the largest packs go first, each to the rank with the least work
that still has room (longest processing time first), and then the slowest rank exchanges packs while that helps: 64 packs
on 8 ranks come to 1.001 of the mean where dealing in order gives 1.23. The cost is counted in multiply-adds of the
forward pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from terrace.data.family import configuration, family_of, shape_of
from terrace.data.types import PackSpec
from terrace.families.shapes import ModelShape
from terrace.recipe.schema import Model

COMPARED_TOGETHER = 2**20  # exchanges, while ranks are balanced
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
    feed_forward = text.feed_forward_matrices * text.mean_intermediate + text.router_width
    per_layer = text.attention_matrices + text.width * feed_forward
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
    return cost_model(shape_of(model), patches // max(1, smallest.rows))


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Numbers of the packs that each rank gets, in ascending order: equal counts, balanced cost.

    `len(costs)` must be a multiple of `ranks`. Deterministic: ties go to the lower number and the lower rank.
    """
    if len(costs) % ranks:
        raise ValueError(f"{len(costs)} packs cannot be dealt evenly to {ranks} ranks")
    share = len(costs) // ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    waiting = [(0.0, rank) for rank in range(ranks)] if share else []
    for pack in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, rank = heapq.heappop(waiting)
        hands[rank].append(pack)
        if len(hands[rank]) < share:
            heapq.heappush(waiting, (load + costs[pack], rank))
    held = np.asarray(hands, np.int64).reshape(ranks, share)
    weights = np.asarray(costs, np.float64)
    loads = np.zeros(ranks)
    for place in range(share):  # in the order in which they were given
        loads += weights[held[:, place]]
    for _ in range(2 * ranks):
        if not share or not _swap(held, loads, weights):
            break
    return [sorted(hand) for hand in held.tolist()]


def _swap(hands: np.ndarray, loads: np.ndarray, costs: np.ndarray) -> bool:
    """Exchange one pack of the slowest rank for a lighter one elsewhere, where that lowers the higher of the two loads.

    `hands` int64 [ranks, packs of each] and `loads` float64 [ranks] are changed. Of equally good exchanges the first: lower
    rank, then earlier pack.
    """
    slowest = int(loads.argmax())
    weights = costs[hands]
    own, together = weights[slowest], max(1, COMPARED_TOGETHER // hands.shape[1] ** 2)
    best, found = loads[slowest] * (1 - 1e-9), None
    for first in range(0, len(loads), together):
        moved = own[None, :, None] - weights[first : first + together, None, :]
        higher = np.maximum(loads[slowest] - moved, loads[first : first + together, None, None] + moved)
        if first <= slowest < first + together:
            higher[slowest - first] = np.inf
        place = int(higher.argmin())
        if higher.flat[place] < best:
            rank, mine, theirs = (int(number) for number in np.unravel_index(place, higher.shape))
            best, found = float(higher.flat[place]), (first + rank, mine, theirs)
    if found is None:
        return False
    rank, mine, theirs = found
    change = own[mine] - weights[rank, theirs]
    hands[slowest, mine], hands[rank, theirs] = hands[rank, theirs], hands[slowest, mine]
    loads[slowest] -= change
    loads[rank] += change
    return True


def deal_in_order(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The plain way to compare with: pack i goes to rank i modulo ranks."""
    return [list(range(rank, len(costs), ranks)) for rank in range(ranks)]


def max_over_mean(costs: Sequence[float], hands: Sequence[Sequence[int]]) -> float:
    """How much longer than the average rank the slowest one works; 1.0 is perfect, and 1.0 for a batch without work."""
    loads = [sum(costs[pack] for pack in hand) for hand in hands]
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean > 0 else 1.0
