"""Temporal grounding: intersection over union of one predicted time span `[mm:ss,mm:ss]` with the solution's.

The solution is the same text, `{"span": [start, end]}` or `[start, end]` in seconds. Also read: `hh:mm:ss`, fractions
of a second, "mm:ss - mm:ss" and "mm:ss to mm:ss". Several different spans, or one that ends before it starts, score 0.
"""

from __future__ import annotations

import re
from typing import Any

from terrace.rewards.rules.answers import visible_text
from terrace.rewards.types import RewardItem

_CLOCK = r"(\d{1,3}):([0-5]?\d)(?::([0-5]?\d))?(\.\d{1,6})?"
_SPAN = re.compile(rf"(?<![\d:]){_CLOCK}\s{{0,4}}(?:,|-|–|—|~|to|and|至|到)\s{{0,4}}{_CLOCK}(?![\d:])")


def _seconds(first: str, second: str, third: str | None, fraction: str | None) -> float:
    whole = int(first) * 60 + int(second) if third is None else int(first) * 3600 + int(second) * 60 + int(third)
    return whole + float(fraction or 0)


def spans_of(text: str) -> list[tuple[float, float]]:
    """The distinct spans in a text, in seconds."""
    found = [(_seconds(*match.groups()[:4]), _seconds(*match.groups()[4:])) for match in _SPAN.finditer(text)]
    return list(dict.fromkeys(found))


def _solution_span(solution: Any) -> tuple[float, float] | None:
    if isinstance(solution, dict):
        solution = solution.get("span")
    if isinstance(solution, str):
        spans = spans_of(solution)
        return spans[0] if len(spans) == 1 else None
    return (float(solution[0]), float(solution[1])) if solution else None


def temporal_grounding(items: list[RewardItem]) -> list[float | None]:
    """Score the one time span of each answer."""
    values: list[float | None] = []
    for item in items:
        gold = _solution_span(item.solution)
        if gold is None or gold[1] <= gold[0]:
            values.append(None)
            continue
        spans = spans_of(visible_text(item.response) or "")
        if len(spans) != 1 or spans[0][1] <= spans[0][0]:
            values.append(0.0)
            continue
        start, end = spans[0]
        intersection = max(0.0, min(end, gold[1]) - max(start, gold[0]))
        union = (end - start) + (gold[1] - gold[0]) - intersection
        values.append(intersection / union)
    return values
