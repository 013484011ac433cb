"""Which rows of an index are held out and which train, found without holding more than one stretch of it in memory.

A seeded hash of what a row holds puts the rows in an order; the first ones are held out, the next ones train. So of each boundary
only the hash and the row that stand there are kept, and any stretch of rows can say for itself on which side it lies. Boundaries and
held-out rows are found once and kept beside the columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from terrace.data.index.columns import CHUNK, Column, ColumnsWriter, made_once

Hashes = Callable[[int, int], np.ndarray]  # (first row, behind the last) -> uint64: what each row holds
Boundary = tuple[int, int] | None  # (seeded hash, row) of the first row that lies behind it; None: no row does
COLLECTED = 2**22  # rows among which a boundary is looked for in memory
_BITS = 16  # by which rows are counted at a time


@dataclass(frozen=True)
class Wanted:
    """What the recipe says of a source: how many rows are held out (or their share), how many take part at all."""

    seed: int = 0
    holdout_samples: int = 0
    holdout_share: float = 0.0
    max_samples: int | None = None

    @property
    def mark(self) -> str:
        values = [self.seed, self.holdout_samples, self.holdout_share, self.max_samples]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Choice:
    """Held out are the rows before the first boundary; those that train lie between it and the second."""

    seed: int
    held_out: int
    start: Boundary
    stop: Boundary
    holdout_rows: Column  # int64, ascending

    def trains(self, first: int, hashes: np.ndarray) -> np.ndarray:
        """bool: which of the rows from `first` on train."""
        mixed = seeded(hashes, self.seed)
        return ~_before(self.start, mixed, first) & _before(self.stop, mixed, first)


def make_choice(wanted: Wanted, rows: int, hashes: Hashes, folder: Path, identity: str) -> Choice:
    """The choice among `rows` rows, kept in a folder for whoever asks next."""

    def make(fresh: Path) -> None:
        share = int(wanted.holdout_share * 2**64)
        held = wanted.holdout_samples
        if wanted.holdout_share:  # each row's own hash decides, whatever rows are added
            held = sum(int((mixed < np.uint64(share)).sum()) for _, mixed in _stretches(rows, hashes, wanted.seed))
        start = _boundary(held, rows, hashes, wanted.seed)
        stop = None if wanted.max_samples is None else _boundary(wanted.max_samples, rows, hashes, wanted.seed)
        writer = ColumnsWriter(fresh, {"holdout_rows": "i8"})
        try:
            for first, mixed in _stretches(rows, hashes, wanted.seed) if held else ():
                writer.append(holdout_rows=first + np.flatnonzero(_before(start, mixed, first)))
            writer.finish({"identity": identity, "held_out": held, "start": start, "stop": stop})
        finally:
            writer.close()

    found = made_once(folder, identity, make)
    start, stop = (None if one is None else (int(one[0]), int(one[1])) for one in (found.facts["start"], found.facts["stop"]))
    return Choice(wanted.seed, found.facts["held_out"], start, stop, found.columns["holdout_rows"])


def seeded(hashes: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of hash and seed: uint64 [N]."""
    with np.errstate(over="ignore"):
        mixed = hashes.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _stretches(rows: int, hashes: Hashes, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(0, rows, CHUNK):
        yield first, seeded(hashes(first, min(rows, first + CHUNK)), seed)


def _before(boundary: Boundary, mixed: np.ndarray, first: int) -> np.ndarray:
    """bool: which rows from `first` on stand before a boundary in the order of (hash, row)."""
    if boundary is None:
        return np.ones(len(mixed), bool)
    value, row = np.uint64(boundary[0]), boundary[1]
    return (mixed < value) | ((mixed == value) & (first + np.arange(len(mixed)) < row))


def _boundary(count: int, rows: int, hashes: Hashes, seed: int) -> Boundary:
    """Where the first `count` rows have passed. While many rows are left to choose from, they are counted by their next bits."""
    if not 0 < count < rows:
        return None if count >= rows else (0, 0)
    prefix, known, size = 0, 0, rows  # the first `known` bits of the row behind the boundary, and how many rows have them
    while size > COLLECTED and known < 64:
        bins = np.zeros(2**_BITS, np.int64)
        for _, mixed in _stretches(rows, hashes, seed):
            following = mixed[_have(mixed, prefix, known)] >> np.uint64(64 - _BITS - known)
            bins += np.bincount((following & np.uint64(2**_BITS - 1)).astype(np.int64), minlength=len(bins))
        ends = np.cumsum(bins)
        number = int(np.searchsorted(ends, count, side="right"))
        size = int(bins[number])
        count -= int(ends[number]) - size
        prefix, known = prefix << _BITS | number, known + _BITS
    values, places = [], []
    for first, mixed in _stretches(rows, hashes, seed):
        here = np.flatnonzero(_have(mixed, prefix, known))
        if known == 64:  # all alike: the row decides
            if count < len(here):
                return prefix, first + int(here[count])
            count -= len(here)
            continue
        values.append(mixed[here])
        places.append(first + here)
    value, place = np.concatenate(values), np.concatenate(places)
    row = np.lexsort((place, value))[count]
    return int(value[row]), int(place[row])


def _have(mixed: np.ndarray, prefix: int, known: int) -> np.ndarray:
    """bool: which hashes begin with these `known` bits."""
    return mixed >> np.uint64(64 - known) == np.uint64(prefix) if known else np.ones(len(mixed), bool)
