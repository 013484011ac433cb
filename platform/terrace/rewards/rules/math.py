"""Answers that are right or wrong (`text_reasoning`, `visual_reasoning`): the solution says how the answer is read.

A solution is a choice, a time, date or ratio, a matrix, a number or quantity, an equation, an inequality or interval, several
values, words, or an expression. Each kind has its reader in a file of its own, and the kind that decided is named in the
judgement. What no reader knows (integrals, sums, case distinctions) is left to math-verify, behind a guard on size.
Value: 1 right, 0 wrong, unreadable or ambiguous ("3 or 4", every choice, a list of numbers for one number). A list of
solutions holds accepted answers: one of them is enough.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from terrace.rewards.rules import clock, equations, intervals, sequences, words
from terrace.rewards.rules.answers import Answer, boxed_contents, final_answer, visible_text
from terrace.rewards.rules.choices import gold_letters, named_letters
from terrace.rewards.rules.fallback import verified
from terrace.rewards.rules.latex import plain
from terrace.rewards.rules.numbers import Number, plain_number, same_number
from terrace.rewards.rules.scalars import Limits, compound_same, same_quantity, same_value
from terrace.rewards.rules.units import compound_value
from terrace.rewards.rules.values import same_expression
from terrace.rewards.types import Judgement, RewardItem

_DECIMAL = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?")
_INLINE = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_LEADING_PROSE = re.compile(r"^[^$\\(\[{<>=]*?\b(?:is|are|be|get|have|obtain|gives|equals|by|at|:)\s*:?\s+(?=\S)", re.IGNORECASE)


def math(items: list[RewardItem], *, relative_tolerance: float = 0.0) -> list[float | None]:
    """1.0 where the response's one answer equals the solution. `metadata["tolerance"]` is an absolute tolerance for numbers."""
    return [_judge(item, relative_tolerance) for item in items]


text_reasoning = math
visual_reasoning = math


def solutions_of(solution: Any) -> list[str]:
    """The accepted answers of a solution as texts; a list holds several, and an empty text or list none."""
    if isinstance(solution, list | tuple):
        return [text for one in solution for text in solutions_of(one)]
    if isinstance(solution, bool):
        return ["yes", "true"] if solution else ["no", "false"]
    if solution is None or isinstance(solution, dict):
        return []
    text = f"{solution:.15g}" if isinstance(solution, float) else str(solution)
    text = text.strip()
    boxed = boxed_contents(text)
    if boxed:
        text = boxed[-1]
    elif re.search(r"\banswer\b", text, re.IGNORECASE):
        answer = final_answer(text)
        text = answer.text if answer is not None and answer.mark in ("marker", "tag") else text
    return [text] if text else []


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    """A response that states the item's solution, or None if it has none."""
    wanted = solutions_of(item.solution)
    if not wanted:
        return None
    letters = gold_letters(wanted[0], _choices(item))
    return ", ".join(sorted(letters[0])) if letters else f"\\boxed{{{wanted[0]}}}"


def _choices(item: RewardItem) -> dict[str, str]:
    return {str(letter).upper(): str(text) for letter, text in (item.metadata.get("choices") or {}).items()}


def _judge(item: RewardItem, relative_tolerance: float) -> Judgement | None:
    wanted = solutions_of(item.solution)
    if not wanted:
        return None
    answer = final_answer(item.response)
    limits = Limits(float(item.metadata.get("tolerance") or 0.0), relative_tolerance)
    choices = _choices(item)
    judged = Judgement(0.0, "", "no answer, or several that differ")
    for gold in wanted:
        chosen = _choice(gold, item.response, answer, choices)
        if chosen is not None:
            judged = chosen
        elif answer is not None:
            kind, right = judge_text(gold, answer, limits)
            judged = Judgement(float(right), answer.text, kind)
        if judged == 1.0:
            return judged
    return judged


def _choice(gold: str, response: str, answer: Answer | None, choices: dict[str, str]) -> Judgement | None:
    letters = gold_letters(gold, choices)
    if letters is None and re.fullmatch("[a-h]", gold) and answer is not None and re.fullmatch(r"\(?[A-H]\)?", answer.text):
        letters = frozenset({gold.upper()}), choices
    if letters is None:
        return None
    wanted, known = letters
    if answer is not None and answer.mark in ("boxed", "tag", "json"):
        text = answer.text
    elif answer is None and any(mark in response for mark in ("\\boxed", "\\fbox", "<answer>", "<|begin_of_box|>")):
        return Judgement(0.0, "", "choice: no answer, or several that differ")
    else:
        text = visible_text(response) or ""
    named = named_letters(text, choices or {})
    if not named and set(known) - set(choices):  # the solution's own words, `(B) blue`
        named = wanted if words.same_words(known[min(wanted)], text) or same_value(known[min(wanted)], text) else named
    return Judgement(float(named == wanted), ", ".join(sorted(named)) or text[:80], "choice")


def judge_text(gold: str, answer: Answer, limits: Limits) -> tuple[str, bool]:
    """(the kind that decided, whether the answer is right). Never raises for what a response says."""
    if _DECIMAL.fullmatch(gold) and _DECIMAL.fullmatch(answer.text):  # the commonest case, without any reading
        numbers = (Number(Fraction(text), False, 0, 0) for text in (gold, answer.text))
        return "number", same_number(*numbers, limits.absolute, limits.relative)
    text = _mathematical(answer)
    if clock.is_time(gold):
        return "time", clock.same_time(gold, answer.text)
    if clock.is_date(gold):
        return "date", clock.same_date(gold, answer.text)
    if clock.is_ratio(gold):
        said = clock.same_ratio(gold, text)
        first, second = gold.split(":", 1)
        return "ratio", said if said is not None else ":" not in second and same_value(f"({first})/({second})", text)
    matrix = sequences.matrix_of(gold) if "\\begin" in gold else None
    if matrix is not None:
        return "matrix", sequences.same_matrix(matrix, text)
    several = equations.assignments(gold)
    if several is not None:
        return "assignments", equations.same_assignments(several, text)
    number = None if _named_thing(gold) else plain_number(gold)
    if number is not None and not equations.is_equation(gold):
        return "number", same_quantity(gold, number, text if answer.mark == "boxed" else _conclusive(answer, text), limits)
    if compound_value(plain(gold)) is not None:
        return "quantity", compound_same(gold, text)
    if equations.is_equation(gold):
        return "equation", equations.same_equation(gold, text, limits)
    spans = intervals.intervals_of(gold)
    if spans is not None and (intervals.says_interval(gold) or intervals.says_interval(text)):
        return "interval", intervals.same_intervals(spans, text)
    if intervals.is_relation(gold):
        return "inequality", intervals.same_relation(gold, text)
    values = sequences.values_of(gold)
    if values.kind != "bare" and len(values.elements) != 1:
        return "values", sequences.same_values(values, text)
    if words.is_words(gold):
        return "words", words.same_words(gold, answer.whole or answer.text) or (len(values.elements) > 1 and _counts(values, text))
    if len(values.elements) > 1:
        return "values", sequences.same_values(values, text)
    right = same_expression(gold, text.rsplit("=", 1)[-1])
    if right is not None:
        return "expression", right
    return "math-verify", verified(gold, text)


def _counts(values: sequences.Values, text: str) -> bool:
    """`3 apples and 2 pears` by its numbers alone."""
    return all(re.match(r"\d", element) for element in values.elements) and sequences.same_values(values, text)


def _named_thing(gold: str) -> bool:
    """A number that only completes a name (`May 5`, `Q1 2010`, `Room 12`): a word that is no filler stands before it."""
    if re.match("[\u4e00-\u9fff]", gold) and re.search(r"\d", gold):
        return bool(re.match("(?:上午|下午|晚上|早上|中午|凌晨|第|周|星期)", gold))
    if re.match("[\u4e00-\u9fff]", gold):
        return not re.fullmatch(r"[零〇一二两三四五六七八九十百千万亿分之]+[个只条名人辆次元本张件天年月岁种位块头]?", gold)
    before = re.match(r"([A-Za-z][A-Za-z'’. ]*?)\s*\d*\s?[-#]?\d", plain(gold).strip())
    if before is None:
        return False
    fillers = {
        "about",
        "approximately",
        "around",
        "x",
        "is",
        "the",
        "answer",
        "exactly",
        "total",
        "usd",
        "us",
        "rs",
        "over",
        "only",
        "roughly",
    }
    return bool({word.lower().strip(".") for word in before.group(1).split()} - fillers)


def _mathematical(answer: Answer) -> str:
    """An answer's text without the prose around it: its one `$...$`, or what follows "is" where it reads as mathematics."""
    if answer.mark == "boxed":
        return answer.text
    inline = list(dict.fromkeys(next(group for group in groups if group).strip() for groups in _INLINE.findall(answer.text)))
    if len(inline) == 1 and not re.search(r"\d", _INLINE.sub(" ", answer.text)):
        return inline[0]
    text = answer.text
    if len(re.findall(r"[A-Za-z]{3,}", plain(text))) >= 2 or answer.mark == "line":
        text = _LEADING_PROSE.sub("", text)
    return text


def _conclusive(answer: Answer, text: str) -> str:
    """For numbers the whole line counts ("3 or 4"), unless its mathematics stands apart."""
    return text if text != answer.text and _INLINE.search(answer.text) else answer.text
