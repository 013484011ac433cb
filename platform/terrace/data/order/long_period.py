"""The interleave of weights whose period is too long to write out: every place is computed from its number alone.

Sources are the leaves of a binary tree. Of the first n picks at a node whose leaves weigh W, its left half, which weighs L,
gets round(n L / W), halves upwards; the others go right. So each node adds at most half a pick to what a source is off its
share: log2(sources) / 2 + 1/2 at most, where the written schedule (mixture.Period) stays below one. All arithmetic is on whole
numbers, so weights may have any number of decimals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Node:
    """Sources `first` to `last` (without it), which weigh `total`; the first half of them weighs `left_total`."""

    first: int
    last: int
    total: int
    left_total: int = 0
    left: _Node | None = None
    right: _Node | None = None


class LongPeriod:
    """What `mixture.Period` answers, for whole weights of any size."""

    def __init__(self, weights: tuple[int, ...]):
        self._weights = weights
        self._root = self._node(0, len(weights))

    def _node(self, first: int, last: int) -> _Node:
        total = sum(self._weights[first:last])
        if last - first == 1:
            return _Node(first, last, total)
        middle = (first + last) // 2
        left = self._node(first, middle)
        return _Node(first, last, total, left.total, left, self._node(middle, last))

    def between(self, start: int, stop: int) -> np.ndarray:
        """Sources of the picks from `start` to `stop` (without it): int16."""
        picks = np.empty(stop - start, np.int16)
        self._fill(self._root, start, picks, np.arange(stop - start))
        return picks

    def _fill(self, node: _Node, start: int, picks: np.ndarray, places: np.ndarray) -> None:
        """Write the sources of a node's picks from `start` on into these places of `picks`."""
        if node.left is None or node.right is None:
            picks[places] = node.first
            return
        before = _left(node, start, len(places) + 1)
        goes_left = before[1:] > before[:-1]
        first = int(before[0])
        self._fill(node.left, first, picks, places[goes_left])
        self._fill(node.right, start - first, picks, places[~goes_left])

    def counts(self, picks: int) -> np.ndarray:
        """Picks per source among the first `picks`: int64 [sources]."""
        counts = np.zeros(len(self._weights), np.int64)
        waiting = [(self._root, picks)]
        while waiting:
            node, number = waiting.pop()
            if node.left is None or node.right is None:
                counts[node.first] = number
                continue
            left = int(_left(node, number, 1)[0])
            waiting += [(node.left, left), (node.right, number - left)]
        return counts

    def slot_of(self, source: int, number: int) -> int:
        """The slot in which `source` is picked for the `number`-th time (from 1)."""
        way, node = [], self._root
        while node.left is not None and node.right is not None:
            way.append((node, source < node.left.last))
            node = node.left if source < node.left.last else node.right
        slot = number - 1
        for above, went_left in reversed(way):  # the first slot at which that many have gone this way
            total, left = above.total, above.left_total
            twice = 2 * total * slot + total
            slot = -(-twice // (2 * left)) - 1 if went_left else twice // (2 * (total - left))
        return slot


def _left(node: _Node, start: int, count: int) -> np.ndarray:
    """round(n L / W), halves upwards, for n = start, start + 1, ...: [count], whole numbers."""
    step, whole = 2 * node.left_total, 2 * node.total
    quotient, rest = divmod(start * step + node.total, whole)
    small = whole * (count + 1) < 2**63
    return quotient + (rest + step * np.arange(count, dtype=np.int64 if small else object)) // whole
