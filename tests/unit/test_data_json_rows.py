"""JSON arrays of any size: the same rows whatever the pieces read and the spans cut, in memory that does not grow with the file."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.data.sources import formats, json_rows, readers
from terrace.data.sources.json_rows import array_rows, array_spans, starts_array
from terrace.data.sources.listing import Listing
from terrace.data.sources.planning import plan_units
from terrace.data.sources.readers import read_rows
from terrace.data.sources.refusals import Refusal
from terrace.storage.files import list_files
from terrace.storage.s3 import DEFAULT_STORAGE

text = st.text(st.sampled_from('aé🙂"\\[]{},: \n\u2028'), max_size=12)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8)


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch):
    return lambda size: monkeypatch.setattr(json_rows, "CHUNK_BYTES", size)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(values, max_size=8), size=st.sampled_from([1, 2, 5, 40, 1000]), span=st.sampled_from([1, 12, 60, 10**6]),
    indent=st.sampled_from([None, 1]), ascii_only=st.booleans(), mark=st.sampled_from([b"", b"\xef\xbb\xbf", b" \n"]),
)  # fmt: skip
def test_rows_are_those_of_the_whole_file(rows, size, span, indent, ascii_only, mark) -> None:
    data = mark + json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode() + b"\n"
    before, json_rows.CHUNK_BYTES = json_rows.CHUNK_BYTES, size
    try:
        assert starts_array(io.BytesIO(data))
        assert [row for row, _ in array_rows(io.BytesIO(data))] == rows
        found = []
        for start, end, first in array_spans(io.BytesIO(data), span):
            assert first == len(found) + 1
            part = list(array_rows(io.BytesIO(data), start, end))
            assert all(start < place <= end for _, place in part)
            found += [row for row, _ in part]
        assert found == rows
    finally:
        json_rows.CHUNK_BYTES = before


@pytest.mark.parametrize(
    ("data", "healthy", "told"),
    [
        (b'[{"a": 1}, {"b": 2}, {"c": ', 2, "cut|Expecting value|byte 20"),
        (b'[{"a": 1}, {"b": 2}', 2, "not closed: the file ends at byte 19"),
        (b'[{"a": 1}, {"b" 2}, {"c": 3}]' + b" " * 5_000, 1, "row at byte 11"),
        (b'[{"a": "\xff"}]', 0, "not UTF-8"),
        (b'[{"a": 1}, {"b": 2}] {"c": 3}', 2, "stands behind it"),
        (b"[" * 100_000, 0, "nested too deeply"),
        (b"[", 0, "not closed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [3, 2**20])
def test_rows_before_a_fault_are_used_and_the_fault_is_told(data, healthy, told, size, pieces) -> None:
    pieces(size)
    *rows, (fault, _) = array_rows(io.BytesIO(data))
    assert [row for row, _ in rows] == [{"a": 1}, {"b": 2}][:healthy]
    assert isinstance(fault, Refusal)
    assert any(part in fault.detail for part in told.split("|"))


def test_a_row_that_never_ends_is_not_read_for_ever(pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces(64)
    monkeypatch.setattr(json_rows, "MAX_ROW_CHARACTERS", 1_000)
    stream = io.BytesIO(b'[{"a": "' + b"x" * 100_000)
    [(fault, _)] = array_rows(stream)
    assert isinstance(fault, Refusal)
    assert fault.reason == "too_large"
    assert stream.tell() < 5_000


def test_a_large_array_is_cut_into_units_and_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces) -> None:
    monkeypatch.setattr(formats, "UNIT_BYTES", 2**19)
    pieces(2**15)
    rows = [{"id": str(number), "text": "é\u2028" * (number % 50)} for number in range(20_000)]
    (tmp_path / "large.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")
    files = list_files(str(tmp_path / "large.json"))
    del rows
    tracemalloc.start()
    units = plan_units(Listing("json", {"json": files}), str(tmp_path), DEFAULT_STORAGE)
    assert len(units) == files[0].size // 2**19 + 1 > 3
    assert sum(unit.cost for unit in units) == pytest.approx(files[0].size, abs=4)
    number, shares = 0, []
    for unit in units:
        for origin, _, row, done in read_rows(unit, DEFAULT_STORAGE):
            number, share = number + 1, done
            assert (origin, row["id"]) == (f"large.json[{number}]", str(number - 1))
        shares.append(share)
    assert number == 20_000
    assert all(0.99 < share <= 1 for share in shares)
    assert tracemalloc.get_traced_memory()[1] < 2 * 2**20  # of a file of 2.6 MB
    tracemalloc.stop()


def test_a_large_object_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_WHOLE_BYTES", 50)
    (tmp_path / "one.json").write_text(json.dumps({"data": [{"text": "words " * 30}]}))
    [unit] = plan_units(Listing("json", {"json": list_files(str(tmp_path))}), str(tmp_path), DEFAULT_STORAGE)
    [(_, _, refusal, _)] = read_rows(unit, DEFAULT_STORAGE)
    assert "as an array or as JSON Lines" in refusal.detail
