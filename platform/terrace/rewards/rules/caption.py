"""Captions: the share of keywords that the text names, times `most_words / words` where the text is longer than that.

The solution is a list of keywords, each a text or a list of synonyms, or `{"keywords": [...], "most_words": n}`. A text below
`least_words` earns 0, and so does one that repeats itself: a list of guesses or a loop is no caption.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from terrace.rewards.rules.answers import visible_text
from terrace.rewards.types import Judgement, RewardItem

_WORD = re.compile(r"[a-zà-ÿ0-9]+(?:['’-][a-z0-9]+)*|[\u4e00-\u9fff]")


def caption(items: list[RewardItem], *, least_words: int = 3, most_words: int = 100, most_repeats: float = 0.5) -> list[float | None]:
    """Score each caption. `most_repeats`: share of words (of three in a row) that may have stood before."""
    return [_score(item, least_words, most_words, most_repeats) for item in items]


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    wanted = _keywords(item.solution)
    if not wanted:
        return None
    words = ", ".join(synonyms[0] for synonyms in wanted)
    return "The picture shows " + words


def _keywords(solution: Any) -> list[list[str]]:
    if isinstance(solution, dict):
        solution = solution.get("keywords")
    if not isinstance(solution, list | tuple):
        return []
    found = [[one] if isinstance(one, str) else list(one) if isinstance(one, list | tuple) else [] for one in solution]
    return found if all(one and all(isinstance(text, str) and _words(text) for text in one) for one in found) else []


def _score(item: RewardItem, least_words: int, most_words: int, most_repeats: float) -> Judgement | None:
    wanted = _keywords(item.solution)
    if not wanted:
        return None
    if isinstance(item.solution, dict):
        most_words = int(item.solution.get("most_words") or most_words)
    text = visible_text(item.response) or ""
    words = _words(text)
    if len(words) < least_words:
        return Judgement(0.0, text[:200], f"{len(words)} words, at least {least_words}")
    triples = list(zip(words, words[1:], words[2:]))
    if triples and 1 - len(set(triples)) / len(triples) > most_repeats:
        return Judgement(0.0, text[:200], "it repeats itself")
    named = sum(any(_names(words, synonym) for synonym in synonyms) for synonyms in wanted)
    length = min(1.0, most_words / len(words))
    return Judgement(named / len(wanted) * length, text[:200], f"{named} of {len(wanted)} keywords in {len(words)} words")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _names(words: list[str], keyword: str) -> bool:
    """Whether the words of `keyword` stand in a row; the last may be in the plural."""
    target = _words(keyword)
    last = {target[-1], target[-1] + "s", target[-1] + "es"}
    size = len(target)
    return any(words[place : place + size - 1] == target[:-1] and words[place + size - 1] in last for place in range(len(words) - size + 1))
