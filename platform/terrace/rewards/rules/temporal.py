"""Temporal grounding: intersection over union of one predicted time span `[mm:ss,mm:ss]` with the solution's.

The solution is the same text, `{"span": [start, end]}`, `{"start", "end"}` or `[start, end]` in seconds. Also read: `hh:mm:ss`,
fractions of a second, seconds ("10 s to 20 s", `[10.0, 20.0]`), JSON, arrows, "starts at .. and ends at ..". Several different
spans, three times, or a span that ends before it starts score 0.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from terrace.rewards.rules.answers import boxed_contents, visible_text
from terrace.rewards.types import Judgement, RewardItem

_CLOCK = re.compile(r"(?<![\d:.])(\d{1,3}):([0-5]?\d)(?::([0-5]?\d))?(?:[.,](\d{1,6})(?![:\d]))?(?![\d:])")
_SECONDS = re.compile(r"(?<![\d:.\w])(\d{1,6}(?:\.\d{1,6})?)\s?(?:s\b|sec\b|secs\b|seconds?\b|秒)?(?![\d:%])")
_MOST_TIMES = 50


def spans_of(text: str) -> list[tuple[float, float]]:
    """The distinct spans in a text, in seconds: its times two by two. Plain numbers are seconds if there is no mm:ss."""
    text = unicodedata.normalize("NFKC", text)
    times = [_clock(*match.groups()) for match in _CLOCK.finditer(text)]
    if not times:
        times = [float(match.group(1)) for match in _SECONDS.finditer(text)]
    if len(times) < 2 or len(times) % 2 or len(set(times)) > _MOST_TIMES:
        return []
    return list(dict.fromkeys(zip(times[::2], times[1::2])))


def _clock(first: str, second: str, third: str | None, fraction: str | None) -> float:
    whole = int(first) * 60 + int(second) if third is None else int(first) * 3600 + int(second) * 60 + int(third)
    return whole + (float(f"0.{fraction}") if fraction else 0.0)


def solution_span(solution: Any) -> tuple[float, float] | None:
    """(start, end) in seconds, or None for what is no span."""
    if isinstance(solution, dict):
        keys = next((pair for pair in (("start", "end"), ("start_time", "end_time")) if set(pair) <= set(solution)), None)
        solution = [solution[key] for key in keys] if keys else solution.get("span")
    if isinstance(solution, list | tuple) and len(solution) == 2:
        solution = f"[{solution[0]}, {solution[1]}]"
    if not isinstance(solution, str):
        return None
    spans = spans_of(re.sub(r"(?<=\d)\s?-\s?(?=\d)", " , ", solution))
    return spans[0] if len(spans) == 1 and spans[0][1] > spans[0][0] else None


def temporal_grounding(items: list[RewardItem]) -> list[float | None]:
    """Score the one time span of each answer."""
    return [_score(item) for item in items]


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    """The solution's span in seconds, or None if there is none."""
    span = solution_span(item.solution)
    return f"[{span[0]:.6f} s, {span[1]:.6f} s]" if span else None


def _score(item: RewardItem) -> Judgement | None:
    gold = solution_span(item.solution)
    if gold is None:
        return None
    text = visible_text(item.response) or ""
    marked = re.findall(r"<answer>(.{0,4000}?)(?:</answer>|\Z)", text, re.DOTALL | re.IGNORECASE) or boxed_contents(text)
    spans = spans_of(" ".join(marked) if marked else text)
    read = ", ".join(f"{start:g}-{end:g} s" for start, end in spans[:5])
    if len(spans) != 1 or spans[0][1] <= spans[0][0]:
        return Judgement(0.0, read, "no span, or several")
    start, end = spans[0]
    intersection = max(0.0, min(end, gold[1]) - max(start, gold[0]))
    union = (end - start) + (gold[1] - gold[0]) - intersection
    return Judgement(intersection / union, read, "temporal iou")
