"""Mapped columns: narrow on disk and wide in memory, never cut to 32 bits, made once, and the same rows as if all were in memory."""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.data.index import choice, columns, content
from terrace.data.index.choice import Wanted, make_choice, seeded
from terrace.data.index.columns import Column, ColumnsWriter, Strings, made_once, open_columns
from terrace.data.index.content import leaking_rows, repeated_rows
from terrace.data.index.mapped import DTYPES, IDS, KIND, LISTS, STARTS
from terrace.data.index.source_index import SourceIndex
from terrace.data.order import items as items_module
from terrace.data.order.items import Items, item_columns, store_items
from terrace.errors import InputError
from terrace.families.qwen2_5_vl import Qwen25VL


def write(folder: Path, dtypes, pieces) -> columns.Columns:
    folder.mkdir(parents=True, exist_ok=True)
    writer = ColumnsWriter(folder, dtypes)
    for piece in pieces:
        writer.append(**piece)
    writer.finish({})
    found = open_columns(folder)
    assert found is not None
    return found


VALUES = {
    "constant": np.full(40, 7), "zero": np.zeros(40, int), "starts": 5 + 3 * np.arange(40), "falls": 90 - np.arange(40),
    "small": np.arange(40) ** 2 % 251,
    "signed": -(np.arange(40) ** 2), "wide": np.arange(40) ** 2 + 2**31, "wider": np.arange(40) ** 3 + 2**40, "one": np.asarray([9]),
    "none": np.zeros(0, int), "jump": np.asarray([1, 2, 3, 5]),
}  # fmt: skip


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_column_reads_as_it_was_written_in_the_least_room(tmp_path: Path, cut: int):
    for name, values in VALUES.items():
        found = write(tmp_path / name, {"x": "i8"}, [{"x": values[at : at + cut]} for at in range(0, len(values), cut)])
        column = found.columns["x"]
        assert column.dtype == np.int64
        assert len(column) == len(values)
        np.testing.assert_array_equal(column[:], values)
        np.testing.assert_array_equal(np.asarray(column)[::-1], column[::-1])
        for places in (slice(1, 9), slice(None, None, 3), np.asarray([0, -1, 0][: len(values)], int), np.arange(len(values)) % 3 == 0):
            np.testing.assert_array_equal(column[places], values[places])
            assert column[places].dtype == np.int64
        assert [column.at(place) for place in range(len(values))] == values.tolist()
        with pytest.raises(IndexError):
            column[len(values)]
        if (np.diff(values) >= 0).all():
            asked = np.asarray([-1, 0, 5, 7, 8, 255, 2**31 + 4, 2**62])
            np.testing.assert_array_equal(column.up_to(asked), np.searchsorted(values, asked, "right"))
        file = tmp_path / name / "x.bin"
        wanted = {"falls": 40, "small": 40, "signed": 80, "wide": 160, "wider": 320, "jump": 4}
        assert (file.stat().st_size if file.exists() else 0) == wanted.get(name, 0), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=4), max_size=5))
def test_any_pieces_of_hashes(tmp_path_factory, pieces):
    values = np.asarray([one for piece in pieces for one in piece], np.uint64)
    found = write(tmp_path_factory.mktemp("h"), {"x": "u8"}, [{"x": np.asarray(piece, np.uint64)} for piece in pieces])
    np.testing.assert_array_equal(found.columns["x"][:], values)


def test_what_a_type_does_not_hold_is_an_error_and_a_cut_file_is_named(tmp_path: Path):
    writer = ColumnsWriter(tmp_path, {"x": "i4"})
    writer.append(x=np.asarray([1, 2**31 - 1, 3]))
    with pytest.raises(OverflowError, match="2147483648 does not fit int32"):
        writer.append(x=np.asarray([2**31]))
    writer.finish({})
    os.truncate(tmp_path / "x.bin", 7)
    with pytest.raises(InputError, match=r"x\.bin has 7 of 12 bytes; delete the folder"):
        open_columns(tmp_path)
    (tmp_path / "x.bin").unlink()
    with pytest.raises(InputError, match="is gone"):
        open_columns(tmp_path)
    assert open_columns(tmp_path / "nowhere") is None


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the descriptors that Linux lists")
def test_an_open_folder_holds_no_descriptor(tmp_path: Path):
    """An index has some twenty columns, a curriculum many sources, and a process often 1,024 descriptors."""
    names = [f"column-{number}" for number in range(50)]
    writer = ColumnsWriter(tmp_path, dict.fromkeys(names, np.int64))
    writer.append(**{name: np.asarray([3, 1, number]) for number, name in enumerate(names)})
    writer.finish({})
    before = len(os.listdir("/proc/self/fd"))
    found = open_columns(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert [found.columns[name][2] for name in names] == list(range(50))


def cached_pages(path: Path) -> int:
    """How many pages of a file the machine holds in memory."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        held, anchor = (ctypes.c_ubyte * pages)(), ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), held) == 0
        del anchor
    return sum(one & 1 for one in held)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts pages as Linux does")
def test_places_that_lie_anywhere_bring_their_own_pages_alone(tmp_path: Path):
    """Not those around them: a thousandth of a large index's rows would bring all of it from the disk."""
    values = np.random.default_rng(0).integers(0, 2**16, 12_000_000, dtype=np.int64)
    column = write(tmp_path, {"x": "i8"}, [{"x": values}]).columns["x"]
    path = tmp_path / "x.bin"
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = cached_pages(path)
    if before > 500:
        pytest.skip(f"this file system does not let go of its pages ({before} stay)")
    places = np.random.default_rng(1).integers(0, len(values), 50)
    np.testing.assert_array_equal(column[places], values[places])
    assert cached_pages(path) - before <= 100
    np.testing.assert_array_equal(column[1_000_000:1_100_000], values[1_000_000:1_100_000])


def test_made_once_by_many_and_again_for_another_index(tmp_path: Path):
    made = []

    def make(fresh: Path) -> None:
        made.append(fresh)
        writer = ColumnsWriter(fresh, {"x": "i8"})
        writer.append(x=np.arange(3) ** 2 + len(made))
        writer.finish({"identity": "a" if len(made) == 1 else "b"})

    found: list[columns.Columns] = []
    threads = [threading.Thread(target=lambda: found.append(made_once(tmp_path / "c", "a", make))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(found) == 6
    again = made_once(tmp_path / "c", "b", make)
    assert again.columns["x"][:].tolist() == [2, 3, 6]
    assert found[0].columns["x"][:].tolist() == [1, 2, 5]  # whoever has the old ones open keeps them

    def fails(fresh: Path) -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        made_once(tmp_path / "d", "a", fails)
    assert {path.name for path in tmp_path.iterdir()} <= {"c", ".c.lock", ".d.lock"}  # nothing half made stays


# ---------------------------------------------------------------- past 2^31


def sparse(folder: Path, name: str, stored: str, count: int, values: dict[int, int]) -> dict[str, object]:
    """A column file with holes, which read as 0, and some values."""
    dtype = np.dtype(stored)
    with open(folder / f"{name}.bin", "wb") as file:
        file.truncate(count * dtype.itemsize)
        for place, value in values.items():
            file.seek(place * dtype.itemsize)
            file.write(np.asarray(value, dtype).tobytes())
    return {"dtype": np.dtype(DTYPES[name]).str, "count": count, "stored": stored}


def test_rows_and_places_behind_two_to_the_32(tmp_path: Path):
    """4.4e9 rows with two files and a picture each: 8.8e9 members. The files on disk are holes but for the last row."""
    rows, last = 4_400_000_000, 4_399_999_999
    even = lambda count, step, dtype="<i8": {"dtype": dtype, "count": count, "first": 0, "step": step}  # noqa: E731
    manifest = {name: even(rows, 0, np.dtype(dtype).str) for name, dtype in DTYPES.items()}
    per_row = {"member": 2, "image": 1, "visual": 1, "coordinate": 0, "cut": 0}
    for group, names in LISTS.items():
        manifest[f"{STARTS}{group}"] = even(rows + 1, per_row[group])
        for name in names:
            manifest[name] = even(rows * per_row[group], 0, np.dtype(DTYPES[name]).str)
    manifest[IDS[0]] = sparse(tmp_path, IDS[0], "u1", rows * 2, {2 * last: ord("z"), 2 * last + 1: ord("9")})
    manifest[IDS[1]] = even(rows + 1, 2)
    manifest["member_offset"] = sparse(tmp_path, "member_offset", "<u4", rows * 2, {2 * last: 77, 2 * last + 1: 2**32 - 1})
    manifest["width"] = sparse(tmp_path, "width", "<u2", rows, {0: 56, last: 112})
    manifest["height"] = sparse(tmp_path, "height", "<u2", rows, {0: 56, last: 28})
    manifest["fixed_tokens"] = sparse(tmp_path, "fixed_tokens", "<u2", rows, {last: 40_000})
    (tmp_path / "columns.json").write_text(json.dumps({"format": 1, "facts": {}, "columns": manifest}))
    stored = open_columns(tmp_path)
    assert stored is not None
    found = stored.columns
    index = SourceIndex(
        "s", "nowhere", ["a.tar"], SimpleNamespace(), Qwen25VL(), found, {group: found[f"{STARTS}{group}"] for group in LISTS},
        Strings(found[IDS[0]], found[IDS[1]]), ["caption"], found[KIND], [".jpg"],
    )  # fmt: skip
    assert len(index) == rows
    place = index.location(last)
    assert (place.id, [member[1] for member in place.members], place.sizes) == ("z9", [77, 2**32 - 1], ((112, 28),))
    tail = index.part(rows - 3, rows)
    assert tail.lengths((784, 12_544)).tolist()[-1] == 40_000 + 4
    assert index.only(np.asarray([0, last])).visual_tokens((784, 12_544)).tolist() == [4, 4]
    assert index.only(np.asarray([0, last])).ids[last] == "z9"


def test_every_column_of_places_holds_what_lies_behind_two_to_the_31(tmp_path: Path):
    places = [*(f"{STARTS}{group}" for group in LISTS), IDS[1], "member_offset", "member_size"]
    far = {name: np.asarray([0, 5, 2**40]) for name in places}
    found = write(tmp_path, DTYPES, [far])
    assert all(found.columns[name][:].tolist() == [0, 5, 2**40] for name in places)


@pytest.mark.parametrize("values", [[0, 0, 5, 9, 200], [-3, 0, 0, 7], [1, 2, 300, 70_000], [4, 6, 8, 10], [3, 3, 3]])
def test_how_many_values_are_at_most_another_whatever_room_they_take(tmp_path: Path, values):
    column = write(tmp_path, {"column": "i8"}, [{"column": np.asarray(values)}]).columns["column"]
    asked = np.asarray([-(2**40), -4, -1, 0, 3, 7, 255, 256, 70_000, 2**40])
    assert column.up_to(asked).tolist() == np.searchsorted(values, asked, "right").tolist()


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("collected", [3, 10**6])
def test_held_out_and_training_rows_are_the_first_of_the_seeded_order(tmp_path: Path, monkeypatch, collected: int):
    """Against a whole sort, with many rows that hold the same."""
    monkeypatch.setattr(choice, "CHUNK", 16)
    monkeypatch.setattr(choice, "COLLECTED", collected)
    rng = np.random.default_rng(0)
    for number, kinds in enumerate((200, 5, 1)):
        hashes = rng.integers(0, 2**64, kinds, dtype=np.uint64)[rng.integers(0, kinds, 200)]
        order = np.argsort(seeded(hashes, 4), kind="stable")
        for values in ((0,), (7,), (7, 0.0, 90), (0, 0.3), (0, 0.3, 150), (200, 0.0, 10)):
            wanted = Wanted(4, *values)
            made = make_choice(wanted, 200, lambda a, b, hashes=hashes: hashes[a:b], tmp_path / f"{collected}{number}" / wanted.mark, "i")
            held = int((seeded(hashes, 4) < np.uint64(int(0.3 * 2**64))).sum()) if wanted.holdout_share else wanted.holdout_samples
            assert made.held_out == held
            np.testing.assert_array_equal(made.holdout_rows[:], np.sort(order[:held]))
            trains = np.concatenate([made.trains(first, hashes[first : first + 33]) for first in range(0, 200, 33)])
            np.testing.assert_array_equal(np.flatnonzero(trains), np.sort(order[held : wanted.max_samples]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.02, 0.4, 0.6, 0.97, 1.0]), rows=st.integers(0, 150))
def test_items_are_those_rows_whatever_is_passed_over(tmp_path_factory, seed, share, rows):
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(rng.random(rows) < share)
    if seed % 3 == 0 and len(kept):  # documents that are split come several times
        kept = np.sort(np.concatenate([kept, kept[::2]]))
    made = Items(kept, *(rng.integers(0, most, len(kept)).astype(np.int32) for most in (9, 2, 70_000, 1, 3, 1)))
    cuts = [0, *np.sort(rng.integers(0, len(kept) + 1, 3)).tolist(), len(kept)]
    pieces = [made[a:b] for a, b in itertools.pairwise(cuts) if b > a]
    with pytest.MonkeyPatch.context() as patch:
        for module in (items_module, columns):
            patch.setattr(module, "CHUNK", 8)
        counted = Counter({"split": 2, "refused": 0})
        stored = store_items(tmp_path_factory.mktemp("i") / "x", "i", lambda: iter(pieces), rows, lambda: iter(()), counted, True)
    assert (len(stored), stored.tokens, stored.facts["changes"]) == (len(kept), int(made.lengths.sum()), {"split": 2})
    some = rng.integers(0, max(1, len(kept)), 12)[: 12 * bool(len(kept))]
    for selection in (slice(None), slice(2, 7), some):
        for found, wanted in zip(item_columns(stored[selection]), item_columns(made[selection])):
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(stored.rows, kept)
    np.testing.assert_array_equal(stored.by_length[:], np.argsort(made.lengths, kind="stable"))
    assert [stored.up_to(length) for length in range(-1, 12)] == [int((made.lengths <= length).sum()) for length in range(-1, 12)]


class Rows:
    """An index of content alone."""

    def __init__(self, texts, pictures, held):
        counts = np.asarray([len(some) for some in pictures])
        shown = [one for some in pictures for one in some]
        self.columns = {"text_hash": np.asarray(texts, np.uint64), "image_hash": np.asarray(shown, np.uint64)}
        self.starts = {"image": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)}
        self.pictures, self.texts, self.holdout_rows = pictures, texts, np.asarray(held, np.int64)

    def __len__(self):
        return len(self.texts)

    def part(self, first, stop):
        return Rows(self.texts[first:stop], self.pictures[first:stop], [])

    @property
    def content_hash(self):
        return content.content_hashes(self.columns, self.starts["image"])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_leaks_and_repeats_against_the_plain_way(seed):
    rng = np.random.default_rng(seed)
    make = lambda count: Rows(  # noqa: E731
        rng.integers(0, 12, count).tolist(), [rng.integers(100, 130, rng.integers(0, 3)).tolist() for _ in range(count)],
        np.sort(rng.permutation(count)[: count // 6]).tolist(),
    )  # fmt: skip
    indexes = {"a": make(30), "b": make(17)}
    held = [(one, row) for one in indexes.values() for row in one.holdout_rows.tolist()]
    pictures = {picture for one, row in held for picture in one.pictures[row]}
    texts, bare = {one.texts[row] for one, row in held}, {one.texts[row] for one, row in held if not one.pictures[row]}
    seen: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "CHUNK", 7)
        patch.setattr(content, "COMPARED_TOGETHER", 9)
        leaks, repeats = leaking_rows(indexes), repeated_rows(indexes)
    for name, one in indexes.items():
        wanted = [
            row for row in range(len(one))
            if row not in one.holdout_rows
            and (pictures & set(one.pictures[row]) or one.texts[row] in bare or (not one.pictures[row] and one.texts[row] in texts))
        ]  # fmt: skip
        assert leaks[name].tolist() == wanted
        hashes = one.content_hash.tolist()
        assert repeats[name].tolist() == [row for row, value in enumerate(hashes) if value in seen or seen.add(value)]


def test_a_column_of_places_is_no_array_until_it_is_asked(tmp_path: Path):
    column = Column("i8", 10**12, None, 3, 2)
    assert column[10**12 - 1] == 3 + 2 * (10**12 - 1)
    assert column[np.asarray([5 * 10**11])].tolist() == [3 + 10**12]
    assert column.up_to(np.asarray([2, 3, 4, 5, 10**14])).tolist() == [0, 1, 1, 2, 10**12]
