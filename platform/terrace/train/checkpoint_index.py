"""Where every number of a checkpoint lies: per kind and parameter the stretches that the ranks wrote, each in its rank's file.

    {"weights": {"model.norm.weight": {"shape": [64], "starts": [0, 32], "ranks": [0, 1]}, …}, "exp_avg": …}

A stretch ends where the next begins. In a file a tensor that is whole has its shape, a stretch is flat; both have the parameter's name.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from terrace.models.tensor_files import Stretch

Written = dict[str, dict[str, tuple[list[int], int, int]]]  # of one rank: kind -> parameter -> (shape of the whole, start, numbers)


@dataclass
class Placed:
    """One tensor: `starts` ascending, and the rank whose file has each stretch."""

    shape: tuple[int, ...]
    starts: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    def overlapping(self, stretch: Stretch) -> list[tuple[int, Stretch]]:
        """(rank, the part of that rank's own stretch that is wanted), in order; together they are the stretch. Nothing is a part too: it
        has the number format of its file."""
        found = []
        if not len(stretch):
            found.append((self.ranks[0], Stretch(stretch.name, 0, 0)))
        else:
            for place in range(bisect.bisect_right(self.starts, stretch.start) - 1, len(self.starts)):
                start = self.starts[place]
                end = self.starts[place + 1] if place + 1 < len(self.starts) else self.numbers
                low, high = max(start, stretch.start), min(end, stretch.end)
                if low >= stretch.end:
                    break
                if low < high:
                    found.append((self.ranks[place], Stretch(stretch.name, low - start, high - start)))
        return found


Index = dict[str, dict[str, Placed]]


def joined_index(written: Iterable[tuple[int, Written]]) -> tuple[Index, list[str]]:
    """The index of what all ranks wrote, and what is wrong with it: numbers that no rank wrote, or several did."""
    parts: dict[str, dict[str, list[tuple[int, int, int, tuple[int, ...]]]]] = {}
    for rank, kinds in written:
        for kind, tensors in kinds.items():
            for name, (shape, start, numbers) in tensors.items():
                parts.setdefault(kind, {}).setdefault(name, []).append((start, numbers, rank, tuple(shape)))
    index: Index = {}
    faults = []
    for kind, tensors in parts.items():
        for name, found in tensors.items():
            found.sort()
            placed = Placed(found[0][3], [start for start, *_ in found], [rank for _, _, rank, _ in found])
            index.setdefault(kind, {})[name] = placed
            at = 0
            for start, numbers, rank, shape in found:
                if start != at or shape != placed.shape:
                    faults.append(f"{kind} of {name}: rank {rank} wrote from number {start} of {list(shape)}, {at} was expected")
                    break
                at += numbers
            else:
                if at != placed.numbers:
                    faults.append(f"{kind} of {name}: {at} of {placed.numbers} numbers were written")
    return index, faults


def index_values(index: Index) -> dict[str, Any]:
    """The index as JSON has it."""
    return {
        kind: {name: {"shape": list(own.shape), "starts": own.starts, "ranks": own.ranks} for name, own in tensors.items()}
        for kind, tensors in index.items()
    }


def index_of(values: Mapping[str, Any]) -> Index:
    """The inverse of `index_values`."""
    return {
        kind: {name: Placed(tuple(own["shape"]), own["starts"], own["ranks"]) for name, own in tensors.items()}
        for kind, tensors in values.items()
    }


def whole_index(files: Iterable[tuple[str, int, Mapping[str, tuple[int, ...]]]]) -> Index:
    """The index of files (kind, rank, shapes by name) that hold whole tensors: of checkpoints of format 1, which have none."""
    index: Index = {}
    for kind, rank, shapes in files:
        index.setdefault(kind, {}).update({name: Placed(tuple(shape), [0], [rank]) for name, shape in shapes.items()})
    return index
