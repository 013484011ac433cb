"""Multiple choice from MMBench's TSV, asked once (plain) and in every rotation of its choices (CircularEval).

A model that always says "A" has a quarter of four-way questions right by luck. Rotated, the right choice stands once at
every letter, and a question counts only if the model finds it every time: luck then gives 0 for a fixed letter and
(1/4)^4 for a random one. Published MMBench figures are of this kind. It costs N answers per question instead of one.

Rotation k writes at letter i the text that first stood at letter (i + k) mod N.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from terrace.data.sources.conventions import ImageReference
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.evaluate.cases import Case, case_digest, checked_size
from terrace.rewards.rules.answers import final_answer, visible_text
from terrace.rewards.rules.choices import named_letters

ROTATION_STEP = 1_000_000  # MMBench's own numbering: rotation k of question i is row k * 1,000,000 + i
REFERENCE_CHARACTERS = 64  # an `image` field this short is the index of the row that has the picture
INSTRUCTION = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with its choices in order (letters A, B, ...)."""

    index: int
    question: str
    choices: tuple[str, ...]
    right: int  # place of the right choice
    image: bytes | None
    hint: str = ""
    category: str = ""

    @property
    def letters(self) -> dict[str, str]:
        return dict(zip(ascii_uppercase, self.choices))

    @property
    def right_letter(self) -> str:
        return ascii_uppercase[self.right]

    @property
    def text(self) -> str:
        lines = [f"Hint: {self.hint}"] if self.hint else []
        lines += [self.question, *(f"{letter}. {choice}" for letter, choice in self.letters.items()), INSTRUCTION]
        return "\n".join(lines)


def rotated(question: ChoiceQuestion, rotation: int) -> ChoiceQuestion:
    """The question with its choices moved `rotation` places up."""
    count = len(question.choices)
    choices = tuple(question.choices[(place + rotation) % count] for place in range(count))
    return ChoiceQuestion(
        question.index, question.question, choices, (question.right - rotation) % count, question.image, question.hint,
        question.category,
    )  # fmt: skip


def rotations(question: ChoiceQuestion) -> list[ChoiceQuestion]:
    """All rotations, the question itself first."""
    return [rotated(question, rotation) for rotation in range(len(question.choices))]


def chosen_letter(answer: str, letters: Mapping[str, str]) -> str | None:
    """The one letter that an answer names (itself, or by the choice's words); None for none or several."""
    found = final_answer(answer)
    if found is not None and found.mark in ("boxed", "tag", "json"):
        named = named_letters(found.text, letters)
    else:
        named = named_letters(visible_text(answer) or "", letters)
    return next(iter(named)) if len(named) == 1 else None


def plain_right(results: Iterable[tuple[str, int, bool]]) -> dict[str, bool]:
    """Per question whether it is right as first asked. `results`: (question, rotation, right)."""
    return {group: right for group, rotation, right in results if rotation == 0}


def circular_right(results: Iterable[tuple[str, int, bool]]) -> dict[str, bool]:
    """Per question whether it is right under every rotation."""
    right: dict[str, bool] = {}
    for group, _, value in results:
        right[group] = right.get(group, True) and value
    return right


# ---------------------------------------------------------------- reading


def read_questions(path: Path, limit: int | None = None) -> list[ChoiceQuestion]:
    """The questions of an MMBench TSV (columns index, question, A, B, ..., answer, image; hint and category optional).

    Rows that are rotations of others (index from 1,000,000 on) are left out: rotations are made here. Raises InputError
    naming file and row.
    """
    rows = _rows(path)
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
            questions.append(_question(row, images))
        except InputError as error:
            raise InputError(f"{path}, row {number}: {error}") from error
    if not questions:
        raise InputError(f"{path}: there is no question in it")
    return questions


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(row number as a spreadsheet counts, the header being 1; the row) of every row."""
    csv.field_size_limit(2**30)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = {"index", "question", "A", "B", "answer"} - set(reader.fieldnames or ())
            if missing:
                raise InputError(
                    f"{path}: the columns {', '.join(sorted(missing))} are missing; this is no MMBench TSV with answers"
                )
            rows = []
            for number, row in enumerate(reader, start=2):
                if None in row or any(value is None for value in row.values()):
                    raise InputError(f"{path}, row {number}: it has another number of columns than the header")
                rows.append((number, {str(key): str(value) for key, value in row.items()}))
            return rows
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); a suite is NAME:FILE") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: it is no tab-separated text ({error})") from error


def _question(row: Mapping[str, str], images: Mapping[str, str]) -> ChoiceQuestion:
    texts = [_cell(row.get(letter)) for letter in ascii_uppercase]
    count = next((place for place, text in enumerate(texts) if not text), len(texts))
    if count < 2 or any(texts[count:]):
        raise InputError("the choices must fill A, B and on without a gap, at least two of them")
    answer = _cell(row["answer"])
    if answer not in ascii_uppercase[:count] or len(answer) != 1:
        raise InputError(
            f"the answer {answer!r} is none of its {count} choices; without answers there is nothing to score"
        )
    if not _cell(row["question"]):
        raise InputError("the question is empty")
    encoded = row.get("image") or ""
    if encoded and len(encoded) <= REFERENCE_CHARACTERS and encoded in images:
        encoded = images[encoded]
    return ChoiceQuestion(
        int(row["index"]), _cell(row["question"]), tuple(texts[:count]), ascii_uppercase.index(answer), _image(encoded),
        _cell(row.get("hint")), _cell(row.get("category")),
    )  # fmt: skip


def _cell(value: str | None) -> str:
    text = (value or "").strip()
    return "" if text.lower() == "nan" else text


def _image(encoded: str) -> bytes | None:
    if not encoded:
        return None
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the image is not base64 ({error})") from error
    checked_size(data, "in the row")
    return data


# ---------------------------------------------------------------- cases


def question_cases(questions: Sequence[ChoiceQuestion]) -> list[Case]:
    """Every rotation of every question as a case, the rotations of one question next to each other."""
    cases = []
    for question in questions:
        images = (ImageReference(None, question.image),) if question.image is not None else ()
        sizes = tuple(checked_size(data, "in the row") for data in (question.image,) if data is not None)
        digests = [hashlib.sha256(data).hexdigest() for data in (question.image,) if data is not None]
        for rotation, asked in enumerate(rotations(question)):
            case_id = str(rotation * ROTATION_STEP + question.index)
            content = [*({"type": "image", "image": 0} for _ in images), {"type": "text", "text": asked.text}]
            prompt = Sample(case_id, "prompt", [{"role": "user", "content": content}])
            metadata = {"choices": asked.letters, "category": question.category}
            digest = case_digest(prompt, asked.right_letter, metadata, digests)
            cases.append(
                Case(
                    case_id, prompt, images, sizes, asked.right_letter, metadata, str(question.index), rotation, digest
                )
            )
    return cases
