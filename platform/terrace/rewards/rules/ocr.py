"""Text in a picture: 1 minus the edits between answer and text as a share of the longer one. A list of texts: the best counts.

Below `least` the value is 0, so that a page of noise does not earn what chance gives it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from terrace.rewards.rules.answers import boxed_contents, visible_text
from terrace.rewards.rules.math import solutions_of
from terrace.rewards.rules.text_distance import distance_share
from terrace.rewards.types import Judgement, RewardItem

MOST_CHARACTERS = 20_000


def ocr(items: list[RewardItem], *, least: float = 0.0, case_sensitive: bool = True) -> list[float | None]:
    """Score each answer's text: what is marked as the answer, else all of the response."""
    return [_score(item, least, case_sensitive) for item in items]


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    wanted = _texts(item.solution)
    return f"<answer>{wanted[0]}</answer>" if wanted else None


def _texts(solution: Any) -> list[str]:
    """The accepted texts as they stand: nothing in them is read as a mark."""
    if isinstance(solution, list | tuple):
        return [text for one in solution for text in _texts(one)]
    return (
        [solution]
        if isinstance(solution, str) and solution.strip()
        else solutions_of(solution)
        if isinstance(solution, int | float)
        else []
    )


def _said(response: str, wanted: list[str]) -> str:
    """The text in `<answer>` or in a box (a picture's own text may hold one), else all of the response."""
    text = visible_text(response) or ""
    tag = re.fullmatch(r".*?<answer>(.*?)(?:</answer>.*)?", text, re.DOTALL)
    if tag:
        return tag.group(1)
    boxed = [] if any("\\boxed" in one for one in wanted) else boxed_contents(text)
    return boxed[-1] if len(boxed) == 1 else text


def _score(item: RewardItem, least: float, case_sensitive: bool) -> Judgement | None:
    wanted = _texts(item.solution)
    if not wanted:
        return None
    said = _said(item.response, wanted)[:MOST_CHARACTERS]
    pairs = [(said, text) if case_sensitive else (said.lower(), text.lower()) for text in wanted]
    value = max(1.0 - distance_share(*pair) for pair in pairs)
    return Judgement(value if value >= least else 0.0, said[:200], "edit share")
