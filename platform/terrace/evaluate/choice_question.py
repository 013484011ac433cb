"""A multiple-choice question and its rotations.

Rotation k writes at letter i the text that first stood at letter (i + k) mod N.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase

ROTATION_STEP = 1_000_000  # MMBench's own numbering: rotation k of question i is row k * 1,000,000 + i
INSTRUCTION = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with its choices in order (letters A, B, ...)."""

    index: int
    question: str
    choices: tuple[str, ...]
    right: int  # place of the right choice
    images: tuple[bytes, ...] = ()
    hint: str = ""
    category: str = ""

    @property
    def image(self) -> bytes | None:
        """The first picture."""
        return self.images[0] if self.images else None

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
        question.index, question.question, choices, (question.right - rotation) % count, question.images, question.hint,
        question.category,
    )  # fmt: skip


def rotations(question: ChoiceQuestion) -> list[ChoiceQuestion]:
    """All rotations, the question itself first."""
    return [rotated(question, rotation) for rotation in range(len(question.choices))]
