"""Columns of numbers as flat little-endian files, which all processes of a machine map and share.

A folder holds one file per column and `columns.json`, written last: names, types, lengths, and facts of whoever made it. A column is
stored in the narrowest type that holds its values and read in the type that it was made with; one whose values go up evenly (a
constant, the starts of lists that are all equally long) is two numbers and no file. Nothing is read when a folder is opened, and only
the pages that somebody asks for afterwards. Places and lengths are 64-bit everywhere.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from terrace.errors import InputError
from terrace.storage.synchronise import file_lock

FORMAT = 1
MANIFEST = "columns.json"
CHUNK = 2**18  # rows that are worked on together: a few megabytes a column
RELEASED = 2**24  # bytes: a larger column is let go of after each read
SINGLES = 512  # reads of one value of it, after which it is let go of
_C = ctypes.CDLL(None)
_NARROW = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<i8", "<u8")


class Column:
    """Values that look like a numpy array of `dtype`: `column[places]` is one, and nothing else is in memory."""

    def __init__(
        self, dtype: Any, count: int, stored: np.ndarray | None = None, first: int = 0, step: int = 0, pages: pa.Buffer | None = None
    ):
        self.dtype, self.shape = np.dtype(dtype), (count,)
        self._stored, self._first, self._step = stored, first, step
        self._pages = pages if pages is not None and pages.size > RELEASED else None
        self._singles = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: Any) -> Any:
        if self._stored is not None:
            self._advise(mmap.MADV_NORMAL if isinstance(places, slice) else mmap.MADV_RANDOM)
            found = self._stored[places].astype(self.dtype)
            self._let_go()
            return found
        if isinstance(places, slice):
            return (self._first + self._step * np.arange(*places.indices(len(self)))).astype(self.dtype)
        places = np.asarray(places)
        if places.dtype == bool:
            places = np.flatnonzero(places)
        count = len(self)
        if places.size and not (-count <= places.min() and places.max() < count):
            raise IndexError(f"a column of {count} values has no place {int(places.max())}")
        return (self._first + self._step * (places % max(1, count))).astype(self.dtype)

    def at(self, place: int) -> int:
        """One whole number, sooner than by `[place]`; `place` is not checked."""
        if self._stored is None:
            return self._first + self._step * place
        self._count_single()
        return self._stored.item(place)

    def _let_go(self) -> None:
        """Unmap the pages that a read brought. They stay in the machine's cache for whoever reads next, but count for no process:
        where files are cached in large pieces, one value would leave megabytes in the process that asked for it."""
        self._advise(mmap.MADV_DONTNEED)

    def _advise(self, what: int) -> None:
        """Tell the kernel of a large column. Places that lie anywhere are read alone: around each of them it would read 128 KiB ahead,
        and a thousandth of the rows would bring the whole column from the disk."""
        if self._pages is not None:
            _C.madvise(ctypes.c_void_p(self._pages.address), ctypes.c_size_t(self._pages.size), what)

    def _count_single(self) -> None:
        self._singles += 1
        if self._singles % SINGLES == 0:
            self._let_go()

    def raw(self, start: int, stop: int) -> bytes:
        """The values from `start` to `stop` as they lie on disk."""
        if self._stored is None:
            return self[start:stop].tobytes()
        self._count_single()
        return self._stored[start:stop].tobytes()

    def up_to(self, values: np.ndarray) -> np.ndarray:
        """int64: how many of the column's values, which ascend, are at most each of these. Reads a few pages a value."""
        if self._stored is not None:
            limits = np.iinfo(self._stored.dtype)
            inside = np.clip(values, limits.min, limits.max).astype(self._stored.dtype)  # of another type numpy would copy the column
            return np.where(np.asarray(values) < limits.min, 0, np.searchsorted(self._stored, inside, "right"))
        if not self._step:
            return np.where(np.asarray(values) >= self._first, len(self), 0)
        return np.clip((np.asarray(values) - self._first) // self._step + 1, 0, len(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def astype(self, dtype: Any) -> np.ndarray:
        return self[:].astype(dtype)

    @property
    def stored_bytes(self) -> int:
        return 0 if self._stored is None else self._stored.nbytes


class Strings:
    """Texts on disk, one behind another in UTF-8; each is read when it is asked for."""

    def __init__(self, content: Column, starts: Column):
        self._content, self._starts = content, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"there are {len(self)} texts, and no number {place}")
        place = int(place) % len(self)
        return self._content.raw(self._starts.at(place), self._starts.at(place + 1)).decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(len(self)))


@dataclass(frozen=True)
class Columns:
    """An opened folder."""

    folder: Path
    facts: dict[str, Any]
    columns: dict[str, Column]

    @property
    def stored_bytes(self) -> int:
        return sum(column.stored_bytes for column in self.columns.values())


def open_columns(folder: Path) -> Columns | None:
    """The columns that a folder holds, or None where there are none. Raises InputError for a file that was cut or is gone."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    if manifest["format"] != FORMAT:
        return None
    return Columns(folder, manifest["facts"], {name: _open(folder, name, facts) for name, facts in manifest["columns"].items()})


def _open(folder: Path, name: str, facts: dict[str, Any]) -> Column:
    dtype, count = facts["dtype"], facts["count"]
    if "stored" not in facts:
        return Column(dtype, count, None, facts["first"], facts["step"])
    stored = np.dtype(facts["stored"])
    path = folder / f"{name}.bin"
    size = path.stat().st_size if path.is_file() else -1
    if size != count * stored.itemsize:
        was = "is gone" if size < 0 else f"has {size} of {count * stored.itemsize} bytes"
        raise InputError(f"{path} {was}; delete the folder {folder}, it is made again from the index")
    if not count:
        return Column(dtype, count, np.empty(0, stored))
    # Arrow's mapping outlives the file that was opened for it, where Python's own keeps a descriptor of each: an index has some twenty
    # columns, and a process may often have 1,024 (256 on a Mac).
    with pa.memory_map(str(path)) as file:
        pages = file.read_buffer()
    return Column(dtype, count, np.frombuffer(pages, stored), 0, 0, pages)


# ---------------------------------------------------------------- writing


@dataclass
class _Growing:
    """A column while it is written."""

    path: Path
    dtype: np.dtype[Any]
    count: int = 0
    lowest: int = 0
    highest: int = 0
    first: int = 0
    last: int = 0
    step: int | None = None  # between neighbours, while it is always the same one; None: not known yet
    even: bool = True
    file: Any = field(default=None, repr=False)

    def append(self, values: np.ndarray) -> None:
        values = np.asarray(values)
        if not len(values):
            return
        if self.dtype.kind in "iu":
            lowest, highest = int(values.min()), int(values.max())
            limits = np.iinfo(self.dtype)
            if lowest < limits.min or highest > limits.max:
                raise OverflowError(f"column {self.path.stem}: {lowest} to {highest} does not fit {self.dtype.name}")
            self._follow(values, lowest, highest)
        else:
            self.even = False
        self.count += len(values)
        np.ascontiguousarray(values, self.dtype.newbyteorder("<")).tofile(self.file)

    def _follow(self, values: np.ndarray, lowest: int, highest: int) -> None:
        if not self.count:
            self.first, self.lowest, self.highest = int(values[0]), lowest, highest
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        self.even = self.even and self.highest < 2**63  # places are int64
        if self.even:
            steps = {int(values[0]) - self.last} if self.count else set()
            if len(values) > 1:
                second = int(values[1]) - int(values[0])
                even = bool((values[1:] == values[:-1] + values.dtype.type(second)).all()) if second >= 0 else False
                steps |= {second} if even else {None}  # type: ignore[arg-type]
            if self.step is not None:
                steps.add(self.step)
            self.even = len(steps) <= 1 and None not in steps and min(steps, default=0) >= 0  # type: ignore[type-var]
            self.step = next(iter(steps), None) if self.even else None
        self.last = int(values[-1])

    def finish(self) -> dict[str, Any]:
        """What the manifest says of it; the file is narrowed, or removed where two numbers say the same."""
        self.file.close()
        facts: dict[str, Any] = {"dtype": self.dtype.newbyteorder("<").str, "count": self.count}
        if self.even:
            self.path.unlink()
            return facts | {"first": self.first, "step": self.step or 0}
        stored = self.dtype.newbyteorder("<")
        if self.dtype.kind in "iu":
            narrow = next(one for one in map(np.dtype, _NARROW) if self.lowest >= np.iinfo(one).min and self.highest <= np.iinfo(one).max)
            if narrow.itemsize < stored.itemsize:
                _rewrite(self.path, stored, narrow)
                stored = narrow
        return facts | {"stored": stored.str}


def _rewrite(path: Path, stored: np.dtype[Any], narrow: np.dtype[Any]) -> None:
    beside = path.with_suffix(".narrow")
    with open(path, "rb") as wide, open(beside, "wb") as file:
        while len(values := np.fromfile(wide, stored, 4 * CHUNK)):
            values.astype(narrow).tofile(file)
    beside.replace(path)


class ColumnsWriter:
    """Columns that are written piece by piece. Nothing but one piece is in memory."""

    def __init__(self, folder: Path, dtypes: Mapping[str, Any]):
        self.folder = folder
        self._growing = {name: _Growing(folder / f"{name}.bin", np.dtype(dtype)) for name, dtype in dtypes.items()}
        for column in self._growing.values():
            column.file = open(column.path, "wb")  # noqa: SIM115

    def append(self, **values: np.ndarray) -> None:
        """More values of each of the columns named. Raises OverflowError for one that the column's type does not hold."""
        for name, some in values.items():
            self._growing[name].append(some)

    def count(self, name: str) -> int:
        return self._growing[name].count

    def read(self, name: str, dtype: Any) -> Iterator[np.ndarray]:
        """What was written of a column so far, in pieces of another type."""
        column = self._growing[name]
        column.file.flush()
        with open(column.path, "rb") as file:
            while len(values := np.fromfile(file, column.dtype.newbyteorder("<"), CHUNK)):
                yield values.astype(dtype)

    def drop(self, name: str) -> None:
        column = self._growing.pop(name)
        column.file.close()
        column.path.unlink()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest: from now on the folder counts."""
        columns = {name: column.finish() for name, column in self._growing.items()}
        (self.folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "facts": dict(facts), "columns": columns}))

    def close(self) -> None:
        for column in self._growing.values():
            column.file.close()


@contextmanager
def _fresh_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends well, and vanishes when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        if folder.exists():  # whoever has mapped the old files keeps them
            folder.rename(old := fresh.with_name(f"{fresh.name}.old"))
            fresh.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def made_once(folder: Path, identity: str, make: Callable[[Path], None]) -> Columns:
    """The columns in `folder` if their facts bear this `identity`; else `make(new folder)` makes them, in one process at a time."""
    found = open_columns(folder)
    if found is None or found.facts.get("identity") != identity:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.with_name(f".{folder.name.lstrip('.')}.lock")):
            found = open_columns(folder)
            if found is None or found.facts.get("identity") != identity:
                with _fresh_folder(folder) as fresh:
                    make(fresh)
                found = open_columns(folder)
    assert found is not None
    return found


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
