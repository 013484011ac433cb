"""Where in a response the answer stands. One response gives one answer: a response that offers several gives none.

Order: `\\boxed{...}`, `<answer>...</answer>`, a JSON object with the key answer, count or result, "(final) answer is/:"
or 答案, else the last line. A closed `<think>...</think>` block is not part of the answer; an unclosed one means that
there is no answer yet. Only the last 20,000 characters are read, so a response of any size costs the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TAIL_CHARACTERS = 20_000
ANSWER_CHARACTERS = 4_000  # what is longer is no answer
_FENCE = re.compile(r"```(?:[A-Za-z][A-Za-z0-9_+-]{0,20})?[ \t]*\n?")
_TAG = re.compile(r"<answer>(.{0,4000}?)</answer>", re.DOTALL | re.IGNORECASE)
_JSON = re.compile(
    r"""["'](?:answer|count|result)["']\s{0,4}:\s{0,4}("[^"\n]{0,500}"|'[^'\n]{0,500}'|-?[\d.,/]{1,40}|\[[^\]\n]{0,500}\])""",
    re.IGNORECASE,
)
_MARKER = re.compile(
    r"(?:\bfinal answer|\banswer|答案)\**\s{0,2}(?:(?:is|are|=|:|：|是|为)\s{0,2}){1,3}\**\s{0,2}", re.IGNORECASE
)
_REASON = re.compile(r"[,;]?\s(?:because|since)\b.*", re.IGNORECASE | re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])|[。！？]")


@dataclass(frozen=True)
class Answer:
    """The answer's text and how it was marked: boxed, tag, json, marker or line."""

    text: str
    mark: str


def visible_text(response: str) -> str | None:
    """The response's tail without its reasoning block and code fences; None while the reasoning is not closed."""
    closed = response.rfind("</think>")
    if closed >= 0:
        response = response[closed + len("</think>") :]
    elif "<think>" in response:
        return None
    response = response[-TAIL_CHARACTERS:]
    for end in ("<|im_end|>", "<|endoftext|>"):
        response = response.replace(end, "")
    return _FENCE.sub("", response).strip() or None


def boxed_contents(text: str) -> list[str]:
    """The contents of every closed `\\boxed{...}` or `\\fbox{...}`, outermost only, in order."""
    contents, place = [], 0
    while True:
        start = min(
            (found for found in (text.find("\\boxed", place), text.find("\\fbox", place)) if found >= 0), default=-1
        )
        if start < 0:
            return contents
        brace = text.find("{", start, start + 10)
        if brace < 0:
            place = start + 5
            continue
        depth, end = 0, -1
        for index in range(brace, len(text)):
            if text[index] == "{":
                depth += 1
            elif text[index] == "}":
                depth -= 1
                if depth == 0:
                    end = index
                    break
        if end < 0:
            return contents
        contents.append(text[brace + 1 : end].strip())
        place = end + 1


def _tidy(text: str) -> str:
    text = text.strip().strip("*").strip()
    return text[:-1].rstrip() if text.endswith((".", "。", ";", ",")) and not text.endswith("..") else text


def _one(candidates: list[str], mark: str) -> Answer | None:
    tidy = [_tidy(candidate) for candidate in candidates]
    distinct = {re.sub(r"[\s$(){}]|\\text", "", candidate).lower() for candidate in tidy}
    return Answer(tidy[-1], mark) if len(distinct) == 1 and 0 < len(tidy[-1]) <= ANSWER_CHARACTERS else None


def final_answer(response: str) -> Answer | None:
    """The one answer of a response, or None if there is none or there are several that differ."""
    text = visible_text(response)
    if text is None:
        return None
    if "\\boxed" in text or "\\fbox" in text:
        boxed = boxed_contents(text)
        # `\boxed{\boxed{5}}` is one answer written twice.
        inner = [(boxed_contents(content) or [content])[-1] for content in boxed]
        return _one(inner, "boxed") if inner else None
    tags = _TAG.findall(text)
    if tags:
        return _one(tags, "tag")
    values = _JSON.findall(text)
    if values:
        return _one([value.strip("\"'") for value in values], "json")
    marked = []
    for match in _MARKER.finditer(text):
        rest = text[match.end() : match.end() + 2000].lstrip()
        rest = _SENTENCE_END.split(rest.split("\n", 1)[0])[0]
        marked.append(_REASON.sub("", rest))
    if marked:
        return _one(marked, "marker")
    last = next((line for line in reversed(text.split("\n")) if line.strip()), "")
    return _one([last], "line")
