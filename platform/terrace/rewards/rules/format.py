"""Form of the response, 1 or 0. Off by default: MORL uses no format reward; a recipe that wants one names it beside another rule."""

from __future__ import annotations

import re
from typing import Literal

from terrace.rewards.rules.answers import boxed_contents, without_end_marks
from terrace.rewards.rules.latex import plain
from terrace.rewards.types import RewardItem

_THINK_ANSWER = re.compile(
    r"\s*<think>(?!\s*</think>)(?:(?!</?think>|</?answer>).)+</think>\s*<answer>(?!\s*</answer>)(?:(?!</?answer>|</?think>).)+</answer>\s*",
    re.DOTALL,
)


def format(
    items: list[RewardItem], *, form: Literal["think_answer", "boxed", "regex"] = "think_answer", pattern: str = ""
) -> list[float | None]:
    """`think_answer`: exactly `<think>..</think><answer>..</answer>`, neither of them blank; `boxed`: exactly one
    `\\boxed{}` with something in it; `regex`: a full match of `pattern`."""
    return [float(_fits(item.response, form, pattern)) for item in items]


format.needs_solution = False  # type: ignore[attr-defined] - see rewards.ready


def _fits(response: str, form: str, pattern: str) -> bool:
    response = without_end_marks(response)
    if form == "boxed":
        contents = boxed_contents(response)
        return len(contents) == 1 and bool(re.search(r"[^\s{}\\.,$]", plain(contents[0])))
    if form == "think_answer":
        return _THINK_ANSWER.fullmatch(response) is not None
    return re.fullmatch(pattern, response, re.DOTALL) is not None
