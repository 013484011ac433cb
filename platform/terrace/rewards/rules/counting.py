"""Counting: 1 for the exact count. An answer that holds several different numbers is no count.

`partial=True` gives 1 - |predicted - true| / max(true, 1), not below 0, for early training where exact counts are rare.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from terrace.rewards.rules.answers import final_answer
from terrace.rewards.rules.numbers import Number, plain_number
from terrace.rewards.types import Judgement, RewardItem

_BOUND = re.compile(r"\b(?:more|fewer|less|greater|other) than\b|\bover \d|\bunder \d|\bnot \w+ ?$", re.IGNORECASE)


def counting(items: list[RewardItem], *, partial: bool = False) -> list[float | None]:
    """Score the one number of each answer (digits, English or Chinese numerals) against the count."""
    return [_score(item, partial) for item in items]


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    """The count itself, or None if the solution is none."""
    gold = count_of(str(item.solution))
    return str(gold.value) if gold is not None else None


def _score(item: RewardItem, partial: bool) -> Judgement | None:
    gold = count_of(str(item.solution))
    if gold is None:
        return None
    answer = final_answer(item.response)
    number = count_of(answer.text) if answer else None
    read = answer.text if answer else ""
    if number is None:
        return Judgement(0.0, read, "no count, or several numbers")
    if not partial:
        return Judgement(float(number.value == gold.value), read, "count")
    return Judgement(max(0.0, float(1 - abs(number.value - gold.value) / max(gold.value, 1))), read, "count: relative error")


def count_of(text: str) -> Number | None:
    """The one whole number that a text states; "more than 4" states none."""
    number = None if _BOUND.search(text) else plain_number(text)
    return number if number is not None and not number.percent and number.value.denominator == 1 and number.value >= 0 else None
