"""One case of the torture set."""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    """What `rule` must say of `response`; `expected` is None where it cannot be judged."""

    rule: str
    response: str
    solution: Any
    expected: float | None
    metadata: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012


T = "text_reasoning"
V = "visual_reasoning"
THINK = "<think>I count 3, then 8, maybe 12.</think>"
