"""MMBench's TSV of multiple-choice questions: columns index, question, A, B, ..., answer, and image or image_path; hint, category.

A picture stands in the row as base64 (plain, URL-safe or a `data:` URL), as the index of the row that has it, or as a path in
`image` or `image_path`; a list in any of these holds several. A question is never asked without the pictures that its row names.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase

from terrace.errors import InputError
from terrace.evaluate.cases import checked_size
from terrace.evaluate.choice_question import ROTATION_STEP, ChoiceQuestion

REFERENCE_CHARACTERS = 64  # an `image` field this short is the index of the row that has the picture, or a path
_EMPTY = {"", "nan", "none", "null", "[]"}


def read_questions(path: Path, limit: int | None = None, images_root: Path | None = None) -> list[ChoiceQuestion]:
    """The questions of a file, the first `limit` of them. Image paths start at `images_root`, or at the file's folder or the one above it.

    Rows that are rotations of others (index from 1,000,000 on) are left out: rotations are made here. Raises InputError
    naming file and row.
    """
    rows = _rows(path)
    roots = [images_root] if images_root is not None else [path.parent, path.parent.parent]
    images = {row["index"]: row.get("image") or "" for _, row in rows}
    indexes = {index for index in images if index.isdigit()}
    questions: list[ChoiceQuestion] = []
    seen: set[str] = set()
    for number, row in rows:
        if limit is not None and len(questions) >= limit:
            break
        try:
            index = row["index"]
            if not index.isdigit():
                raise InputError(f"the index {index!r} is no whole number")
            if index in seen:
                raise InputError(f"the index {index} was there before")
            seen.add(index)
            if int(index) >= ROTATION_STEP and str(int(index) % ROTATION_STEP) in indexes:
                continue
            questions.append(_question(row, images, roots))
        except InputError as error:
            raise InputError(f"{path}, row {number}: {error}") from error
    if not questions:
        raise InputError(f"{path}: there is no question in it")
    return questions


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(row number as a spreadsheet counts, the header being 1; the row) of every row."""
    csv.field_size_limit(2**30)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = {"index", "question", "A", "B", "answer"} - set(reader.fieldnames or ())
            if missing:
                raise InputError(
                    f"{path}: the columns {', '.join(sorted(missing))} are missing; this is no MMBench TSV with answers "
                    f"(it has {', '.join(map(str, reader.fieldnames or ())) or 'no header'})"
                )
            rows = []
            for number, row in enumerate(reader, start=2):
                if None in row or any(value is None for value in row.values()):
                    raise InputError(f"{path}, row {number}: it has another number of columns than the header")
                named = {str(key): str(value) for key, value in row.items()}
                rows.append((number, {**named, "index": re.sub(r"\.0+$", "", named["index"].strip())}))
            return rows
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); a suite is NAME:FILE") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: it is no tab-separated text in UTF-8 ({error})") from error


def _question(row: Mapping[str, str], images: Mapping[str, str], roots: Sequence[Path]) -> ChoiceQuestion:
    texts = [_cell(row.get(letter)) for letter in ascii_uppercase]
    count = next((place for place, text in enumerate(texts) if not text), len(texts))
    if count < 2 or any(texts[count:]):
        raise InputError("the choices must fill A, B and on without a gap, at least two of them")
    if not _cell(row["question"]):
        raise InputError("the question is empty")
    return ChoiceQuestion(
        int(row["index"]), _cell(row["question"]), tuple(texts[:count]), _right(_cell(row["answer"]), texts[:count]),
        _pictures(row, images, roots), _cell(row.get("hint")), _cell(row.get("category")),
    )  # fmt: skip


def _right(answer: str, texts: Sequence[str]) -> int:
    """The place of the right choice: its letter in either case, alone or as `(B)` or `B.`."""
    letter = re.fullmatch(r"\(?([A-Za-z])\)?[.)]?", answer)
    place = ascii_uppercase.index(letter.group(1).upper()) if letter else len(texts)
    if place >= len(texts):
        raise InputError(f"the answer {answer!r} is none of its {len(texts)} choices; without answers there is nothing to score")
    return place


def _cell(value: str | None) -> str:
    text = (value or "").strip()
    return "" if text.lower() == "nan" else text


def _pictures(row: Mapping[str, str], images: Mapping[str, str], roots: Sequence[Path]) -> tuple[bytes, ...]:
    found = [_picture(cell, images, roots) for cell in _list(row.get("image"))]
    if found:
        return tuple(found)
    return tuple(_file(cell, roots) for cell in _list(row.get("image_path")))


def _list(cell: str | None) -> list[str]:
    """The entries of a cell: none, one, or those of a list in JSON's or Python's writing."""
    text = (cell or "").strip()
    if text.lower() in _EMPTY:
        return []
    if not text.startswith("["):
        return [text]
    for read in (json.loads, ast.literal_eval):
        try:
            entries = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(entries, list) and all(isinstance(entry, str) and entry.strip().lower() not in _EMPTY for entry in entries):
            return [entry.strip() for entry in entries]
    raise InputError(f"the list of images {text[:60]}... is not one of texts")


def _picture(cell: str, images: Mapping[str, str], roots: Sequence[Path]) -> bytes:
    if len(cell) <= REFERENCE_CHARACTERS and cell in images:
        cells = _list(images[cell])
        if len(cells) != 1 or (len(cells[0]) <= REFERENCE_CHARACTERS and cells[0] in images):
            raise InputError(f"the image {cell} is that of row {cell}, which has no picture of its own")
        cell = cells[0]
    if re.search(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?)$", cell, re.IGNORECASE):
        return _file(cell, roots)
    encoded = re.sub(r"^data:[\w/+.-]*(?:;[\w=-]+)*;base64,", "", cell, flags=re.IGNORECASE).translate(str.maketrans("-_", "+/"))
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        known = "" if len(cell) > REFERENCE_CHARACTERS else f", and no row has the index {cell}"
        raise InputError(f"the image is not base64 ({error}){known}") from error
    checked_size(data, "in the row")
    return data


def _file(name: str, roots: Sequence[Path]) -> bytes:
    for root in roots:
        path = root / name
        if path.is_file():
            data = path.read_bytes()
            checked_size(data, name)
            return data
    raise InputError(f"image {name} is in none of {', '.join(map(str, roots))}; name their folder with --images-root")
