"""Charts and figures: relaxed accuracy as published for ChartQA. A number may be off by 5 % of the expected one (0 only by 0), other
text must be the same words. Its quirk is kept: a year is a number, so 2008 is right where 2010 is expected (`tolerance: 0` is exact).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from terrace.rewards.rules.answers import final_answer
from terrace.rewards.rules.math import solutions_of
from terrace.rewards.rules.numbers import plain_number, same_number
from terrace.rewards.rules.text_distance import plain_words
from terrace.rewards.types import Judgement, RewardItem

TOLERANCE = 0.05


def chart(items: list[RewardItem], *, tolerance: float = TOLERANCE) -> list[float | None]:
    """Score each answer; of a list of solutions one is enough."""
    return [_score(item, tolerance) for item in items]


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    wanted = solutions_of(item.solution)
    return f"<answer>{wanted[0]}</answer>" if wanted else None


def _score(item: RewardItem, tolerance: float) -> Judgement | None:
    wanted = solutions_of(item.solution)
    if not wanted:
        return None
    answer = final_answer(item.response)
    if answer is None:
        return Judgement(0.0, "", "no answer, or several that differ")
    return Judgement(max(relaxed(answer.text, text, tolerance) for text in wanted), answer.text, "relaxed accuracy")


def relaxed(text: str, expected: str, tolerance: float = TOLERANCE) -> float:
    """1 where an answer's text is the expected one within `tolerance`, else 0."""
    wanted, number = plain_number(_thousands(expected)), plain_number(_thousands(text))
    if wanted is None:
        return float(plain_words(text).casefold().strip(".") == plain_words(expected).casefold().strip("."))
    return float(number is not None and same_number(wanted, number, 0.0, tolerance))


def _thousands(text: str) -> str:
    """`12K` on a chart is twelve thousand (elsewhere it may be twelve kelvin)."""
    return re.sub(r"(?<=\d)K(?![A-Za-z])", "k", text)
