"""Where in a response the answer stands. One response gives one answer: a response that offers several gives none.

Order: `\\boxed{...}` (or begin-of-box tokens), `<answer>...</answer>`, a JSON object with the key answer, count or result,
"(final) answer is/:" or 答案, else the last line, of which the conclusion ("so 4 in total") if it has one. A box that is called
wrong is no answer, and neither is a box that is not closed; an `<answer>` that the length limit cut is. A closed
`<think>...</think>` block is not part of the answer; an unclosed one means that there is no answer yet. Only the last 20,000
characters are read, so a response of any size costs the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

TAIL_CHARACTERS = 20_000
END_CHARACTERS = 400
ANSWER_CHARACTERS = 4_000  # what is longer is no answer
_FENCE = re.compile(r"```(?:[A-Za-z][A-Za-z0-9_+-]{0,20})?[ \t]*\n?")
_TAG = re.compile(r"<answer>((?:(?!<answer>).){0,4000}?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_BOX_TOKENS = re.compile(r"<\|begin_of_box\|>(.{0,4000}?)<\|end_of_box\|>", re.DOTALL)
# marks around a box or a point are part of an answer
_END_MARKS = re.compile(r"(?:\s{0,9}(?:<\|(?!\w{0,20}(?:box|point|ref|quad))\w{1,40}\|>|</s>|<eos>|<end_of_turn>))+\s*\Z")
_BARE_BOX = re.compile(r"\\f?box(?:ed)?\s+([^\s{}$\\]{1,40})|\\boxed([0-9][^\s{}$\\]{0,40})")
_CALLED_WRONG = re.compile(
    r"\$?\s*(?:is|was|would be|cannot be|can't be)\s+(?:clearly\s+)?(?:wrong|incorrect|not|false|too)\b", re.IGNORECASE
)
_JSON = re.compile(
    r"""["'](?:answer|count|result)["']\s{0,4}:\s{0,4}("[^"\n]{0,500}"|'[^'\n]{0,500}'|-?[\d.,/]{1,40}|\[[^\]\n]{0,500}\])""",
    re.IGNORECASE,
)
_MARKER = re.compile(
    r"(?:\bfinal answer|\banswer|\bans\b|答案|故答案|(?<![\u4e00-\u9fff])答)\**\s{0,2}(?:(?:is|are|=|:|：|是|为)\s{0,2}){1,3}\**\s{0,2}"
    r"(?:\b(?:clearly|therefore|simply|then|thus)\b\s{0,2})?|\A[#*\s]{0,6}(?:final )?answer[*\s]{0,6}\n\s{0,4}",
    re.IGNORECASE,
)
_REASON = re.compile(r"[,;]?\s\(?(?:because|since)\b.*", re.IGNORECASE | re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])|[。！？]")
_CLOSING = re.compile(r"(?:i hope|hope this|let me know|feel free|thank|if you (?:have|need|want)|please )", re.IGNORECASE)
_EXPLAINS = re.compile(
    r"(?:explanation|because|reason|since|justification|here(?:'s| is) (?:why|how)|this is because|解释|因为|理由)", re.IGNORECASE
)
_BARE = re.compile(r"(?:\S+\s?){1,3}")
_CONCLUSION = re.compile(
    r"(?:^|[.,;:!?\s])(?:so|therefore|thus|hence|making|altogether|for a total of|in total,?|total of|which gives|that gives|we get)\b,?\s"
    r"|所以|因此|总共|一共|共有?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """The answer's text and how it was marked: boxed, tag, json, marker or line."""

    text: str
    mark: str
    whole: str = ""  # of a line: all of it, where `text` is its conclusion


def visible_text(response: str) -> str | None:
    """The response's tail without its reasoning block and code fences; None while the reasoning is not closed."""
    closed = response.rfind("</think>")
    if closed >= 0:
        response = response[closed + len("</think>") :]
    elif "<think>" in response:
        return None
    response = without_end_marks(response[-TAIL_CHARACTERS:])
    return _FENCE.sub("", response).strip() or None


def without_end_marks(text: str) -> str:
    """`text` without the special marks that a model's turn ends with, whatever its tokenizer calls them."""
    tail = text[-END_CHARACTERS:]
    return text[: len(text) - len(tail)] + _END_MARKS.sub("", tail)


def boxed_contents(text: str) -> list[str]:
    """The contents of every closed `\\boxed{...}` or `\\fbox{...}`, outermost only, in order."""
    contents, place = [], 0
    while True:
        start = min((found for found in (text.find("\\boxed", place), text.find("\\fbox", place)) if found >= 0), default=-1)
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


def _open_box(text: str) -> bool:
    """Whether the last `\\boxed{` is never closed: the answer was cut off, or malformed on purpose."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    return start >= 0 and not boxed_contents(text[start:])


def _boxes(text: str) -> list[str]:
    """What stands in boxes, without those that the text itself calls wrong."""
    contents, place = [], 0
    found = boxed_contents(text)
    for content in found:
        place = text.find(content, place) + len(content)
        if len(found) == 1 or not _CALLED_WRONG.match(text[place : place + 60].lstrip("}$ ")):
            contents.append(content)
    return contents


def conclusion(line: str) -> str:
    """What a sentence ends in: "2 on the left and 2 on the right, so 4 in total" is "4 in total"."""
    line = line.strip()
    last = [piece for piece in _SENTENCE_END.split(line) if piece.strip()][-1:] or [line]
    marks = [match for match in _CONCLUSION.finditer(last[0]) if last[0][match.end() :].strip(" .。,")]
    return last[0][marks[-1].end() :].strip() if marks else last[0].strip()


def _tidy(text: str) -> str:
    text = text.strip().strip("*").strip()
    text = re.sub(r"^(?:(?:#{1,6}|>)\s+|(?:→|⇒|∴|=>|->)\s*)", "", text)
    return text[:-1].rstrip() if text.endswith((".", "。", ";", ",")) and not text.endswith("..") else text


def _one(candidates: list[str], mark: str) -> Answer | None:
    tidy = [_tidy(candidate) for candidate in candidates]
    if mark in ("marker", "line"):
        tidy = [re.sub(r"(?<=\w)[!！]+$", "", candidate) for candidate in tidy]  # "The answer is 7!" is no factorial
    distinct = {re.sub(r"[\s$(){}]|\\text", "", candidate).lower() for candidate in tidy}
    return Answer(tidy[-1], mark) if len(distinct) == 1 and 0 < len(tidy[-1]) <= ANSWER_CHARACTERS else None


def final_answer(response: str) -> Answer | None:
    """The one answer of a response, or None if there is none or there are several that differ."""
    text = visible_text(response)
    if text is None:
        return None
    text = _BARE_BOX.sub(
        lambda match: f"\\boxed{{{(match.group(1) or match.group(2)).rstrip('.,;')}}}", _BOX_TOKENS.sub(r"\\boxed{\1}", text)
    )
    if "\\boxed" in text or "\\fbox" in text:
        if _open_box(text):
            return None
        # `\boxed{\boxed{5}}` is one answer written twice.
        inner = [(boxed_contents(content) or [content])[-1] for content in _boxes(text)]
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
    marked = [rest for rest in marked if not _MARKER.search(rest)] or marked  # "Final Answer: The final answer is 7"
    if marked:
        return _one(marked, "marker")
    lines = [line for line in text.split("\n") if line.strip(" *#>`")]
    if not lines:
        return None
    while len(lines) > 1 and _CLOSING.match(lines[-1].strip(" *_")):
        lines.pop()
    if len(lines) > 1 and _BARE.fullmatch(_tidy(lines[0])) and _EXPLAINS.match(lines[1].strip(" *_#")):
        lines = lines[:1]  # the answer first, and an explanation after
    found = _one([conclusion(_tidy(lines[-1]))], "line")
    return replace(found, whole=_tidy(lines[-1])) if found else None
