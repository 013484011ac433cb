"""The training items of a source: columns on disk that the processes of a machine share.

Ten bytes or so an item lie on disk: what is the same for all items (a source without limits of its own, documents that nobody cuts)
takes none, and which rows take part is kept as those that do not, where these are few. Only the pages that a window draws from are read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from terrace.data.index.columns import CHUNK, Column, Columns, ColumnsWriter, made_once

DTYPES = {
    "rows": np.int64, "lengths": np.int32, "visual_tokens": np.int32, "pixel_rows": np.int32, "pixels_max": np.int32,
    "starts": np.int32, "stops": np.int32,
}  # fmt: skip
_PLACED = ("rows", "starts", "stops")  # which items they are; the others say how large


@dataclass(frozen=True)
class Items:
    """Columns of some training items; int64 or int32 [n] each."""

    rows: np.ndarray  # rows of the source's index
    lengths: np.ndarray  # tokens
    visual_tokens: np.ndarray
    pixel_rows: np.ndarray
    pixels_max: np.ndarray  # the sample's own limit of pixels per image, 0: the stage's
    starts: np.ndarray  # token range kept; stop -1: the whole sample
    stops: np.ndarray

    def __getitem__(self, selection: Any) -> Items:
        return Items(*(column[selection] for column in item_columns(self)))

    def __len__(self) -> int:
        return len(self.rows)


def item_columns(items: Items) -> list[np.ndarray]:
    return [getattr(items, name) for name in DTYPES]


class StoredItems:
    """Items on disk. A selection (a slice, or their numbers) is `Items` in memory, and so is a whole column that somebody asks for."""

    def __init__(self, columns: Columns):
        self._columns, self.facts = columns.columns, columns.facts
        self.stored_bytes = columns.stored_bytes

    def __len__(self) -> int:
        return self.facts["count"]

    def __getitem__(self, selection: Any) -> Items:
        others = (self._columns[name][selection] for name in DTYPES if name != "rows")
        return Items(self._rows(selection), *others)

    def _rows(self, selection: Any) -> np.ndarray:
        if "rows" in self._columns:
            return self._columns["rows"][selection]
        numbers = np.arange(*selection.indices(len(self))) if isinstance(selection, slice) else np.asarray(selection, np.int64)
        return numbers + self._columns["passed_over"].up_to(numbers)

    def __getattr__(self, name: str) -> Any:
        if name == "rows":
            return self._rows(slice(None))
        if name in DTYPES:
            return self._columns[name][:]
        raise AttributeError(name)

    @property
    def tokens(self) -> int:
        return self.facts["tokens"]

    @property
    def placed(self) -> str:
        """Two sources of the same value have the same items, of whatever size."""
        return self.facts["placed"]

    @property
    def by_length(self) -> Column:
        """int64 [n]: the items from the shortest to the longest; of a source with `on_damage: skip`."""
        return self._columns["by_length"]

    def up_to(self, length: int) -> int:
        """How many items have at most so many tokens."""
        ends = self._columns["length_ends"]
        return ends.at(min(length, len(ends) - 1)) if length >= 0 and len(ends) else 0


class StageSource(Protocol):
    """What the plan asks of a source; `EligibleSource` answers from an index, a test from a formula."""

    name: str
    count: int  # training items in one epoch
    mean_tokens: float  # per item
    changes: dict[str, int]  # how many samples were refused, split, shortened or reduced

    def take(self, numbers: np.ndarray) -> Items: ...

    def id_of(self, row: int) -> str: ...


@dataclass
class EligibleSource:
    """The training items of an indexed source for one stage."""

    name: str
    items: StoredItems
    id_of: Callable[[int], str]
    changes: dict[str, int] = field(default_factory=dict)
    mark: str = ""  # changes when any item or its id does

    @property
    def count(self) -> int:
        return len(self.items)

    @property
    def mean_tokens(self) -> float:
        return self.items.tokens / len(self.items) if len(self.items) else 0.0

    def take(self, numbers: np.ndarray) -> Items:
        return self.items[numbers]


# ---------------------------------------------------------------- on disk


def store_items(
    folder: Path, identity: str, pieces: Callable[[], Iterator[Items]], rows: int, id_hashes: Callable[[], Iterator[np.ndarray]],
    changes: Counter[str], by_length: bool,
) -> StoredItems:
    """The items of the pieces in a folder, of an index of `rows` rows; made once.

    `changes` are read when the last piece has come. `by_length` keeps the items' order by length as well.
    """

    def make(fresh: Path) -> None:
        writer = ColumnsWriter(fresh, DTYPES | {"passed_over": np.int64, "by_length": np.int64, "length_ends": np.int64})
        try:
            for items in pieces():
                writer.append(**dict(zip(DTYPES, item_columns(items))))
            facts = _facts(writer, id_hashes()) | {"identity": identity, "changes": dict(+changes)}
            _keep_rows(writer, rows, facts["rises"])
            if by_length:
                _keep_by_length(writer, fresh)
            else:
                writer.drop("by_length")
                writer.drop("length_ends")
            writer.finish(facts)
        finally:
            writer.close()

    return StoredItems(made_once(folder, identity, make))


def _facts(writer: ColumnsWriter, id_hashes: Iterator[np.ndarray]) -> dict[str, Any]:
    """Count, tokens and digests of what was written; `rises`: whether each row is behind the one before."""
    mark, placed, tokens, rises, last = hashlib.sha256(), hashlib.sha256(), 0, True, -1
    for hashes in id_hashes:
        mark.update(np.ascontiguousarray(hashes, np.uint64).tobytes())
    for name, dtype in DTYPES.items():
        for values in writer.read(name, dtype):
            content = values.tobytes()
            mark.update(content)
            if name in _PLACED:
                placed.update(content)
            if name == "lengths":
                tokens += int(values.sum(dtype=np.int64))
            if name == "rows":
                rises = rises and int(values[0]) > last and bool((values[1:] > values[:-1]).all())
                last = int(values[-1])
    return {"count": writer.count("rows"), "tokens": tokens, "mark": mark.hexdigest(), "placed": placed.hexdigest(), "rises": rises}


def _keep_rows(writer: ColumnsWriter, rows: int, rises: bool) -> None:
    """Instead of the rows those that are passed over, less their number before each, where that is shorter."""
    count = writer.count("rows")
    if not rises or rows - count > count // 2:
        writer.drop("passed_over")
        return
    next_row = number = 0
    for values in writer.read("rows", np.int64):
        number += _pass_over(writer, next_row, values, number)
        next_row = int(values[-1]) + 1
    for first in range(next_row, rows, CHUNK):
        some = np.arange(first, min(rows, first + CHUNK))
        writer.append(passed_over=some - number - np.arange(len(some)))
        number += len(some)
    writer.drop("rows")


def _pass_over(writer: ColumnsWriter, next_row: int, values: np.ndarray, number: int) -> int:
    """Write the rows from `next_row` on that are missing among ascending values, stretch by stretch; how many they are."""
    found = 0
    for first in range(next_row, int(values[-1]), CHUNK):
        stop = min(int(values[-1]), first + CHUNK)
        there = np.zeros(stop - first, bool)
        begin, end = np.searchsorted(values, [first, stop])
        there[values[begin:end] - first] = True
        missing = first + np.flatnonzero(~there)
        writer.append(passed_over=missing - number - found - np.arange(len(missing)))
        found += len(missing)
    return found


def _keep_by_length(writer: ColumnsWriter, fresh: Path) -> None:
    """The items' numbers from the shortest to the longest, and how many have at most each length."""
    count = writer.count("lengths")
    ends = np.zeros(1, np.int64)
    for values in writer.read("lengths", np.int64):
        longer = np.zeros(max(len(ends), int(values.max()) + 1), np.int64)
        longer[: len(ends)] = ends
        ends = longer + np.bincount(values, minlength=len(longer))
    ends = np.cumsum(ends)
    writer.append(length_ends=ends)
    if not count:
        return
    path = fresh / "by_length.unsorted"
    numbers = np.memmap(path, np.int64, "w+", shape=(count,))
    following, first = np.concatenate([[0], ends[:-1]]), 0
    for values in writer.read("lengths", np.int64):
        order = np.argsort(values, kind="stable")
        sorted_values = values[order]
        begins = np.searchsorted(sorted_values, sorted_values)  # of its length, in this piece
        numbers[following[sorted_values] + np.arange(len(order)) - begins] = first + order
        following += np.bincount(values, minlength=len(following))
        first += len(values)
    for start in range(0, count, CHUNK):
        writer.append(by_length=numbers[start : start + CHUNK])
    del numbers
    path.unlink()
