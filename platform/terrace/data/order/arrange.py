"""Which samples of a window stand together: packs and steps that are fair draws of the mixture, and no sample twice in one of them.

Best-fit-decreasing fills best and sorts by length: its first packs hold the longest documents, its last ones nothing but captions, and
two draws of one sample, equally long, lie side by side. So the number of packs is taken from it, and the packs are filled otherwise: the
large samples first and most of the others in the mixture's own order, each to the pack with the most room, and only the last third
by best fit from the longest down, which closes the gaps. The packs then lie so that any few behind each other are spread over the window.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

LARGE_SHARE = 8  # samples of more than an eighth of a pack are placed first: later there would be no room for them
CLOSING_SHARES = (0.35, 0.6, 0.85)  # of the others, kept to close the gaps; more of them where that took a pack too many
PASSED_OVER = 8  # packs that hold the same sample already and are passed over
GOLDEN = 0.6180339887498949
SWAPS_TRIED = 64


class _Packs:
    """Packs being filled: what each holds, and the room left."""

    def __init__(self, sizes: list[int], keys: list[int], visual: list[int] | None, limits: tuple[int, int]):
        self.sizes, self.keys, self.visual = sizes, keys, visual
        self.limits = limits  # (tokens, visual tokens) of a pack
        self.members: list[list[int]] = []
        self.held: list[set[int]] = []
        self.free: list[int] = []
        self.visual_free: list[int] = []

    def open(self) -> int:
        self.members.append([])
        self.held.append(set())
        self.free.append(self.limits[0])
        self.visual_free.append(self.limits[1])
        return len(self.members) - 1

    def put(self, sample: int, pack: int) -> None:
        self.members[pack].append(sample)
        self.held[pack].add(self.keys[sample])
        self.free[pack] -= self.sizes[sample]
        if self.visual is not None:
            self.visual_free[pack] -= self.visual[sample]

    def takes(self, sample: int, pack: int) -> bool:
        """Whether a pack that has the room has room for the pictures too."""
        return self.visual is None or self.visual[sample] <= self.visual_free[pack]


def pack_mixed(
    lengths: np.ndarray,
    keys: np.ndarray,
    count: int,
    sequence_length: int,
    visual_tokens: np.ndarray | None = None,
    max_visual_tokens: int | None = None,
) -> list[list[int]]:
    """Samples (by number) in `count` packs, or a few more where they do not fit, each a draw of the whole.

    `keys` says which samples are the same: two of one key stand in one pack only where nothing else is left.
    """
    found: list[list[int]] = []
    for share in CLOSING_SHARES:
        found = _pack_mixed(lengths, keys, count, share, sequence_length, visual_tokens, max_visual_tokens)
        if len(found) <= count:
            break
    return found


def _pack_mixed(
    lengths: np.ndarray,
    keys: np.ndarray,
    count: int,
    closing_share: float,
    sequence_length: int,
    visual_tokens: np.ndarray | None,
    max_visual_tokens: int | None,
) -> list[list[int]]:
    visual = visual_tokens.tolist() if visual_tokens is not None and max_visual_tokens is not None else None
    packs = _Packs(lengths.tolist(), keys.tolist(), visual, (sequence_length, max_visual_tokens or 0))
    room = [(-sequence_length, packs.open()) for _ in range(count)]  # a heap: the pack with the most room first
    large = np.flatnonzero(lengths * LARGE_SHARE > sequence_length)
    large = large[np.argsort(-lengths[large], kind="stable")]
    others = np.flatnonzero(lengths * LARGE_SHARE <= sequence_length)
    spread = int(len(others) * (1 - closing_share))
    late = [sample for sample in [*large.tolist(), *others[:spread].tolist()] if not _to_the_emptiest(sample, packs, room)]
    _to_the_fullest(sorted(late + others[spread:].tolist(), key=lambda sample: -packs.sizes[sample]), packs)
    return [members for members in packs.members if members]


def _to_the_emptiest(sample: int, packs: _Packs, room: list[tuple[int, int]]) -> bool:
    aside = []
    placed = False
    while room and len(aside) < PASSED_OVER and -room[0][0] >= packs.sizes[sample]:
        entry = heapq.heappop(room)
        pack = entry[1]
        if packs.keys[sample] in packs.held[pack] or not packs.takes(sample, pack):
            aside.append(entry)
            continue
        packs.put(sample, pack)
        aside.append((-packs.free[pack], pack))
        placed = True
        break
    for entry in aside:
        heapq.heappush(room, entry)
    return placed


def _to_the_fullest(samples: Sequence[int], packs: _Packs) -> None:
    """Best fit: each to the pack with the least room that it still fits into, one that does not hold it if there is one."""
    room = sorted((free, pack) for pack, free in enumerate(packs.free))
    for sample in samples:
        first = bisect_left(room, (packs.sizes[sample], -1))
        fits = [place for place in range(first, len(room)) if packs.takes(sample, room[place][1])] if packs.visual is not None else None
        places = range(first, len(room)) if fits is None else fits
        place = next((place for place in places if packs.keys[sample] not in packs.held[room[place][1]]), None)
        if place is None and len(places):
            place = places[0]
        pack = room.pop(place)[1] if place is not None else packs.open()
        packs.put(sample, pack)
        insort(room, (packs.free[pack], pack))


def spread_packs(weights: Sequence[float], start: float) -> list[int]:
    """An order of packs in which any few behind each other are spread evenly over all, by weight. `start` in [0, 1) turns it."""
    by_weight = np.argsort(np.asarray(weights), kind="stable")
    turns = (start + GOLDEN * np.arange(len(weights))) % 1.0
    return by_weight[np.argsort(np.argsort(turns, kind="stable"), kind="stable")].tolist()


def repeats_apart(order: list[int], held: Sequence[set[int]], first_pack: int, batch: int) -> list[int]:
    """The order with packs exchanged until no step (of `batch` packs, the first of them at `first_pack`) holds a sample twice."""
    order = list(order)
    steps: dict[int, list[int]] = {}
    for place in range(len(order)):
        steps.setdefault((first_pack + place) // batch, []).append(place)

    def clashes(pack: int, places: list[int], without: int) -> bool:
        return any(place != without and not held[pack].isdisjoint(held[order[place]]) for place in places)

    for place in range(len(order)):
        own = steps[(first_pack + place) // batch]
        if not clashes(order[place], own, place):
            continue
        for other in range(place + 1, min(len(order), place + 1 + SWAPS_TRIED)):
            theirs = steps[(first_pack + other) // batch]
            if theirs is own:
                continue
            if not clashes(order[other], own, place) and not clashes(order[place], theirs, other):
                order[place], order[other] = order[other], order[place]
                break
    return order
