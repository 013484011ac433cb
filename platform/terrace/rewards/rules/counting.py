"""Counting: 1 for the exact count. An answer that holds several different numbers is no count.

`partial=True` gives 1 - |predicted - true| / max(true, 1), not below 0, for early training where exact counts are rare.
"""

from __future__ import annotations

from terrace.rewards.rules.answers import final_answer
from terrace.rewards.rules.math import plain_number
from terrace.rewards.types import RewardItem


def counting(items: list[RewardItem], *, partial: bool = False) -> list[float | None]:
    """Score the one number of each answer (digits, English or Chinese numerals) against the count."""
    return [_score(item, partial) for item in items]


def _score(item: RewardItem, partial: bool) -> float | None:
    gold = plain_number(str(item.solution))
    if gold is None:
        return None  # the prompt's own solution is no number: nobody can judge this
    answer = final_answer(item.response)
    number = plain_number(answer.text) if answer else None
    if number is None or number.percent or number.value.denominator != 1 or number.value < 0:
        return 0.0
    if not partial:
        return float(number.value == gold.value)
    return max(0.0, float(1 - abs(number.value - gold.value) / max(gold.value, 1)))
