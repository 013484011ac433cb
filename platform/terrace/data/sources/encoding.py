"""Bytes of a text file to text: UTF-8, or UTF-16 and UTF-32 where a byte order mark says so. Nothing is guessed and nothing replaced."""

from __future__ import annotations

import codecs

from terrace.data.sources.refusals import Refusal

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_MARKS_BEGIN = frozenset(mark[:1] for mark, _ in _MARKS)


def decode_text(data: bytes, what: str = "the text") -> str:
    """The text of a file, without its byte order mark. Raises Refusal for any other encoding."""
    marked = data[:1] in _MARKS_BEGIN
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8") if marked else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        told = f"is not {'UTF-8' if encoding.startswith('utf-8') else encoding.upper()} ({error.reason} at byte {error.start})"
        raise Refusal("bad_row", f"{what} {told}; save it as UTF-8") from error
    if "\0" in text:
        raise Refusal("bad_row", f"{what} holds zero bytes, as UTF-16 without a byte order mark does; save it as UTF-8")
    return text
