"""Multiple choice, asked once (plain) and in every rotation of its choices (CircularEval).

A model that always says "A" has a quarter of four-way questions right by luck. Rotated, the right choice stands once at
every letter, and a question counts only if the model finds it every time: luck then gives 0 for a fixed letter and
(1/4)^4 for a random one. Published MMBench figures are of this kind. It costs N answers per question instead of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from terrace.data.sources.conventions import ImageReference
from terrace.data.types import Sample
from terrace.evaluate.cases import Case, case_digest, checked_size
from terrace.evaluate.choice_file import read_questions
from terrace.evaluate.choice_question import ROTATION_STEP, ChoiceQuestion, rotations
from terrace.rewards.rules.answers import final_answer, visible_text
from terrace.rewards.rules.choices import named_letters


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


# ---------------------------------------------------------------- cases


def read_choice_cases(path: Path, limit: int | None = None, images_root: Path | None = None) -> list[Case]:
    """Every rotation of the first `limit` questions of a file, as cases."""
    return question_cases(read_questions(path, limit, images_root))


def question_cases(questions: Sequence[ChoiceQuestion]) -> list[Case]:
    """Every rotation of every question as a case, the rotations of one question next to each other."""
    cases = []
    for question in questions:
        images = tuple(ImageReference(None, data) for data in question.images)
        sizes = tuple(checked_size(data, "in the row") for data in question.images)
        digests = [hashlib.sha256(data).hexdigest() for data in question.images]
        for rotation, asked in enumerate(rotations(question)):
            case_id = str(rotation * ROTATION_STEP + question.index)
            content = [*({"type": "image", "image": number} for number in range(len(images))), {"type": "text", "text": asked.text}]
            prompt = Sample(case_id, "prompt", [{"role": "user", "content": content}])
            metadata = {"choices": asked.letters, "category": question.category}
            digest = case_digest(prompt, asked.right_letter, metadata, digests)
            cases.append(Case(case_id, prompt, images, sizes, asked.right_letter, metadata, str(question.index), rotation, digest))
    return cases
