"""Rows of a JSON array, one at a time: a file of any size needs as much memory as its largest row.

The standard decoder reads one value out of a piece of text and says where it ended; where the piece ends first, more is read. A large
array is cut into spans of whole rows by one such pass (about 80 MB a second), so that its rows are ingested in parallel and a restart
goes on where it stopped, as with JSON Lines. Rows before a fault are used; the fault itself is one refused row, with its place.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from terrace.data.sources.refusals import Refusal

CHUNK_BYTES = 2**20
MAX_ROW_CHARACTERS = 256 * 2**20
MAX_WHOLE_BYTES = 2**30  # of a file that is no array, which must be held as a whole
_BEFORE, _OPENING = re.compile(r"[\ufeff\s]*"), re.compile(r"\[")
_GAP = re.compile(r"[\s,]*")
_NEAR_THE_END = 16  # characters: an escape or literal that the end of the piece has cut


def starts_array(stream: IO[bytes]) -> bool:
    """Whether the file's value is an array. Leaves the stream at its beginning."""
    if stream.seekable():
        head = stream.read(4096)
        stream.seek(0)
    else:
        head = stream.peek(4096)  # type: ignore[attr-defined]  # zstd's, which cannot go back
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def array_rows(stream: IO[bytes], start: int = 0, end: int | None = None) -> Iterator[tuple[Any, int]]:
    """(row, bytes of the file up to its end) of an array's rows that begin in bytes [start, end); a Refusal where it cannot go on."""
    place = start
    try:
        for row, place in _rows(stream, start, end):
            yield row, place
    except UnicodeDecodeError as error:
        yield Refusal("bad_row", f"not UTF-8 behind byte {place} ({error.reason})"), place


def _rows(stream: IO[bytes], start: int, end: int | None) -> Iterator[tuple[Any, int]]:
    if start:
        stream.seek(start)
    reader = _Text(stream, start)
    if start == 0:
        reader.skip(_BEFORE)
        while reader.exhausted() and reader.more():
            reader.skip(_BEFORE)
        reader.skip(_OPENING)
    scan = json.JSONDecoder().raw_decode
    while True:
        reader.skip(_GAP)
        if reader.exhausted():
            if reader.more():
                continue
            yield Refusal("bad_row", f"the array is not closed: the file ends at byte {reader.place}"), reader.place
            return
        if end is not None and reader.place >= end:
            return
        if reader.text[reader.at] == "]":
            reader.go_to(reader.at + 1)
            reader.skip(_BEFORE)
            while reader.exhausted() and reader.more():
                reader.skip(_BEFORE)
            if not reader.exhausted():
                yield Refusal("bad_row", f"the array ends at byte {reader.place}, and something stands behind it"), reader.place
            return
        try:
            row, stop = scan(reader.text, reader.at)
        except ValueError as error:
            if _may_go_on(error, len(reader.text)) and len(reader.text) - reader.at < MAX_ROW_CHARACTERS and reader.more():
                continue
            if len(reader.text) - reader.at >= MAX_ROW_CHARACTERS:
                told = f"the row at byte {reader.place} has more than {MAX_ROW_CHARACTERS:,} characters; what lies behind it is not read"
                yield Refusal("too_large", told), reader.place
                return
            yield Refusal("bad_row", f"not readable as JSON in the row at byte {reader.place} ({error})"), reader.place
            return
        except RecursionError as error:
            yield Refusal("bad_row", f"the row at byte {reader.place} is nested too deeply ({error})"), reader.place
            return
        rest = len(reader.text) - stop
        if rest < _NEAR_THE_END and not reader.text[stop:].lstrip().startswith((",", "]")) and reader.more():
            continue  # a number may go on behind the piece
        reader.go_to(stop)
        yield row, reader.place


def concatenated_rows(content: bytes) -> Iterator[Any]:
    """The values of a file that holds several, one behind the other, each over many lines."""
    text, scan, at = content.decode("utf-8-sig"), json.JSONDecoder().raw_decode, 0
    while at < len(text):
        gap = _GAP.match(text, at)
        at = gap.end() if gap is not None else at
        if at >= len(text):
            return
        try:
            row, at = scan(text, at)
        except (ValueError, RecursionError) as error:
            yield Refusal("bad_row", f"not readable as JSON from character {at} on ({error})")
            return
        yield row


def array_spans(stream: IO[bytes], span_bytes: int) -> list[tuple[int, int, int]]:
    """[(first byte, end byte, number of the first row)]: spans of whole rows of about `span_bytes` that cover the array."""
    spans, start, first, number, place = [], 0, 1, 0, 0
    for row, place in array_rows(stream):
        number += 1
        if place - start >= span_bytes and not isinstance(row, Refusal):
            spans.append((start, place, first))
            start, first = place, number + 1
    if start == 0 or number >= first:
        spans.append((start, max(place, start) + 1, first))
    return spans


def _may_go_on(error: ValueError, length: int) -> bool:
    """Whether the decoder failed because the text ended, and not because it is wrong."""
    position = getattr(error, "pos", 0)
    return "Unterminated string" in str(error) or position >= length - _NEAR_THE_END


class _Text:
    """A file's text piece by piece, and the byte that the next character comes from."""

    def __init__(self, stream: IO[bytes], place: int):
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._ended = False
        self.text, self.at, self.place = "", 0, place
        self.more()

    def more(self) -> bool:
        """Read on, twice as much where one row is large; False at the file's end. What is done with is forgotten."""
        if self._ended:
            return False
        chunk = self._stream.read(max(CHUNK_BYTES, len(self.text) - self.at))
        self._ended = not chunk
        self.text, self.at = self.text[self.at :] + self._decode(chunk, self._ended), 0
        return bool(chunk)

    def exhausted(self) -> bool:
        return self.at >= len(self.text)

    def go_to(self, at: int) -> None:
        self.place += len(self.text[self.at : at].encode("utf-8"))
        self.at = at

    def skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self.text, self.at)
        if found is not None:
            self.go_to(found.end())
