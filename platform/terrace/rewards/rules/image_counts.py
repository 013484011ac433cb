"""Counting over several images: one count per image, in their order.

The solution is a list of counts, or `{"counts": [...]}`. Read: `[3, 1, 0]`, "Image 1: 3, Image 2: 1, Image 3: 0", 图1：3, "3, 1, 0",
a line per image. All right: 1. `partial: true`: the share of images whose count is right.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from terrace.rewards.rules.answers import final_answer, visible_text
from terrace.rewards.rules.counting import count_of
from terrace.rewards.types import Judgement, RewardItem

_NUMBERED = re.compile(
    r"(?:\b(?:image|picture|photo|figure|img|pic)|图片?|第)\s{0,2}#?(\d{1,3})\s{0,2}(?:张|幅)?(?:图片?)?\W{1,4}(?:(?:has|shows?|is|are|with|contains|有)\s)?(.{1,60}?)"
    r"(?=[,;.]?\s*(?:\band\s)?(?:\b(?:image|picture|photo|figure|img|pic)\b|图|第)|[;\n]|$)",
    re.IGNORECASE,
)


def image_counts(items: list[RewardItem], *, partial: bool = False) -> list[float | None]:
    """Score the counts of each answer."""
    return [_score(item, partial) for item in items]


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    wanted = _counts(item.solution)
    return str(wanted) if wanted else None


def _counts(solution: Any) -> list[int]:
    values = solution.get("counts") if isinstance(solution, dict) else solution
    if not isinstance(values, list | tuple):
        return []
    numbers = [count_of(str(value)) for value in values]
    return [int(number.value) for number in numbers if number] if all(numbers) else []


def _score(item: RewardItem, partial: bool) -> Judgement | None:
    wanted = _counts(item.solution)
    if not wanted:
        return None
    said = counts_of(item.response)
    if said is None or len(said) != len(wanted):
        return Judgement(0.0, str(said or ""), f"{len(said or [])} counts for {len(wanted)} images")
    right = sum(one == other for one, other in zip(wanted, said))
    value = right / len(wanted) if partial else float(right == len(wanted))
    return Judgement(value, str(said), f"{right} of {len(wanted)} counts")


def counts_of(response: str) -> list[int] | None:
    """The counts of an answer, one per image in order; None without them, or where one image has two."""
    answer = final_answer(response)
    marked = answer is not None and answer.mark in ("boxed", "tag")
    text = unicodedata.normalize("NFKC", answer.text if marked and answer else visible_text(response) or "")
    numbered: dict[int, int] = {}
    for match in _NUMBERED.finditer(text):
        number = count_of(match.group(2))
        if number is None or numbered.get(int(match.group(1)), number.value) != number.value:
            return None
        numbered[int(match.group(1))] = int(number.value)
    if numbered:
        return [numbered[place] for place in sorted(numbered)] if sorted(numbered) == list(range(1, len(numbered) + 1)) else None
    listed = re.findall(r"\[([\d\s,]{1,400})\]", text)
    text = listed[-1] if listed else text.strip().split("\n")[-1]
    numbers = [count_of(part) for part in re.split(r",|;|、|\band\b", text) if part.strip()]
    return [int(number.value) for number in numbers if number] if numbers and all(numbers) else None
