"""JSON objects in a response: in `<tool_call>` tags, in a code fence, or bare; and equality of JSON values."""

from __future__ import annotations

import json
import re
from typing import Any

from terrace.rewards.rules.answers import TAIL_CHARACTERS

_TAGGED = re.compile(r"<tool_call>(.{0,8000}?)</tool_call>", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.{0,8000}?)```", re.DOTALL)
_DECODER = json.JSONDecoder()
MOST_VALUES = 50


def json_values(response: str) -> list[Any]:
    """The JSON objects and lists of a response behind its reasoning, in order; empty where marked text is not JSON.

    Tags go before fences, fences before bare text. `[{...}, {...}]` is one list.
    """
    closed = response.rfind("</think>")
    if closed < 0 and "<think>" in response:
        return []
    text = response[closed + len("</think>") if closed >= 0 else 0 :][-TAIL_CHARACTERS:]
    for pattern in (_TAGGED, _FENCED):
        marked = pattern.findall(text)
        if marked:
            try:
                return [json.loads(part) for part in marked[:MOST_VALUES]]
            except ValueError:
                return []
    return _bare(text)


def _bare(text: str) -> list[Any]:
    values: list[Any] = []
    place = 0
    while len(values) < MOST_VALUES:
        start = min((found for found in (text.find("{", place), text.find("[", place)) if found >= 0), default=-1)
        if start < 0:
            break
        try:
            value, place = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            place = start + 1
            if place > 2000 and not values:
                break  # brackets of something else: no reading in quadratic time
            continue
        if isinstance(value, dict | list) and value:
            values.append(value)
    return values


def same_json(first: Any, second: Any) -> bool:
    """Equal JSON values: 1 is 1.0, true is not 1, the order of an object's keys does not count, that of a list does."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_json(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_json, first, second))
    return first == second
