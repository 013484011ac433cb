"""Rows of given responses to verdicts, and verdicts to a summary: the pure part of `terrace judge`.

A row is one JSON object: `response` (or `responses`), `solution`, `task`, and what the rule needs (`choices`, `tolerance`,
`image_sizes`, `model_sizes`, ... at the top or under `metadata`). `right`, `expect` or `expected` says what a person would give,
`family` groups rows in the summary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.rewards.ready import stated_solution
from terrace.rewards.types import RewardItem, Score

AGREES_WITHIN = 0.005  # a verdict is a person's if it differs by no more
NOT_METADATA = {
    "messages", "images", "videos", "response", "responses", "solution", "task", "prompt", "family", "right", "expect", "expected", "rule",
    "options", "metadata", "licence", "source", "attribution", "id",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One response that is to be judged."""

    line: int  # of the file, from 1
    task: str
    family: str
    item: RewardItem
    expected: float | None


@dataclass(frozen=True)
class Judged:
    """One response with its verdict."""

    line: int
    task: str
    family: str
    response: str
    solution: Any
    value: float | None
    reason: str  # what was read and what decided, or why there is no value
    seconds: float
    expected: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether the verdict is the expected one; true where none is expected."""
        return self.expected is None or (self.value is not None and abs(self.value - self.expected) <= AGREES_WITHIN)


def asked_rows(path: Path, rewards: Mapping[str, Sequence[Any]], state_solutions: bool) -> list[Asked]:
    """The responses of a file. With `rewards` of one task, rows need not name theirs. Raises InputError naming file and line."""
    found: list[Asked] = []
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where}: a row is a JSON object, not {json.dumps(row)[:60]}")
        task = rule_key(row) if row.get("rule") and rule_key(row) in rewards else row.get("task")
        if task not in rewards and len(rewards) == 1:
            task = next(iter(rewards))
        if task not in rewards:
            raise InputError(f"{where}: its task {task!r} has no reward; there are {', '.join(rewards)}")
        metadata = {**{key: value for key, value in row.items() if key not in NOT_METADATA}, **(row.get("metadata") or {})}
        item = RewardItem(_prompt(row), "", row.get("solution"), metadata)
        for response in _responses(row, item, rewards[task][0], state_solutions, where):
            found.append(Asked(number, task, str(row.get("family") or task), item._replace(response=response), _expected(row, where)))
    if not found:
        raise InputError(f"{path}: there is no row in it")
    return found


def rule_key(row: Mapping[str, Any]) -> str:
    """The name under which a row that names its own `rule` is judged: the rule, with its options if it has any."""
    options = row.get("options") or {}
    return str(row.get("rule")) + (f" {json.dumps(options, sort_keys=True)}" if options else "")


def rules_of_rows(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Key -> (rule, options) of a file whose rows name them. Raises InputError for a row that does not."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, row in _rows(path):
        if not isinstance(row, dict) or not isinstance(row.get("rule"), str):
            raise InputError(f"{path}, line {number}: it names no `rule`; give the rule in place of -")
        found[rule_key(row)] = (row["rule"], row.get("options") or {})
    if not found:
        raise InputError(f"{path}: there is no row in it")
    return found


def _rows(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: it is not JSON ({error}); mend or remove the row") from error


def _responses(row: Mapping[str, Any], item: RewardItem, rule: Any, state_solutions: bool, where: str) -> list[str]:
    if state_solutions:
        stated = stated_solution(rule.name, item, rule.options)
        if stated is None:
            raise InputError(f"{where}: the reward {rule.name} cannot read its solution {str(row.get('solution'))[:80]!r}; mend the row")
        return [stated]
    responses = row["responses"] if "responses" in row else [row.get("response")]
    if not isinstance(responses, list) or not all(isinstance(response, str) for response in responses):
        raise InputError(f"{where}: it has no `response` (a text) or `responses` (texts); --solutions judges the solutions themselves")
    return responses


def _expected(row: Mapping[str, Any], where: str) -> float | None:
    value = next((row[key] for key in ("right", "expect", "expected") if key in row), None)
    if value is not None and (not isinstance(value, int | float) or not 0 <= value <= 1):
        raise InputError(f"{where}: the expected verdict {value!r} is no number in [0, 1]")
    return None if value is None else float(value)


def _prompt(row: Mapping[str, Any]) -> str:
    """The prompt in words; images as marks."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    texts = []
    for message in row.get("messages") or ():
        content = message.get("content") if isinstance(message, dict) else None
        texts.append(content if isinstance(content, str) else json.dumps(content))
    return "\n".join(texts)


def judged_rows(asked: Sequence[Asked], scores: Sequence[Score]) -> list[Judged]:
    return [
        Judged(
            one.line, one.task, one.family, one.item.response, one.item.solution, score.value,
            score.failure or "; ".join(score.reasons.values()), score.seconds, one.expected,
        )
        for one, score in zip(asked, scores, strict=True)
    ]  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Verdicts of one family."""

    family: str
    count: int
    mean: float
    full: int  # value 1
    none: int  # value 0
    failures: int
    expected: int  # rows with an expected verdict
    differ: int
    paid_too_much: int
    median_ms: float
    p99_ms: float


def summaries(rows: Sequence[Judged]) -> list[Summary]:
    """One line per family in alphabetical order, and "all" behind several."""
    families = sorted({row.family for row in rows})
    groups = {family: [row for row in rows if row.family == family] for family in families}
    if len(families) > 1:
        groups["all"] = list(rows)
    return [_summary(name, group) for name, group in groups.items()]


def _summary(family: str, rows: Sequence[Judged]) -> Summary:
    values = [row.value for row in rows if row.value is not None]
    times = sorted(1000 * row.seconds for row in rows)
    differ = [row for row in rows if not row.agrees]
    return Summary(
        family, len(rows), sum(values) / len(values) if values else 0.0, sum(value > 1 - 1e-6 for value in values),
        sum(value == 0 for value in values), len(rows) - len(values), sum(row.expected is not None for row in rows), len(differ),
        sum(row.value is not None and row.expected is not None and row.value > row.expected for row in differ),
        times[len(times) // 2], times[max(0, math.ceil(0.99 * len(times)) - 1)],
    )  # fmt: skip


def row_text(row: Judged) -> str:
    """One verdict on one line."""
    value = "none " if row.value is None else f"{row.value:.3f}"
    expected = "" if row.agrees else f"  EXPECTED {row.expected:g}"
    return f"line {row.line:<6} {row.task}  {value}{expected}  {_short(row.response)} for {_short(row.solution)}  [{row.reason}]"


def summary_text(found: Sequence[Summary], expecting: bool) -> str:
    """The table of families."""
    head = ["family", "rows", "mean", "full", "zero", "failed", "median ms", "p99 ms"]
    lines: list[list[Any]] = [
        [one.family, one.count, f"{one.mean:.3f}", one.full, one.none, one.failures, f"{one.median_ms:.2f}", f"{one.p99_ms:.2f}"]
        for one in found
    ]
    if expecting:
        head += ["expected", "differ", "paid too much"]
        lines = [[*line, one.expected, one.differ, one.paid_too_much] for line, one in zip(lines, found)]
    table = [head, *[[str(cell) for cell in line] for line in lines]]
    widths = [max(len(line[place]) for line in table) for place in range(len(head))]
    cells = [[cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(line, widths))] for line in table]
    return "\n".join("  ".join(line) for line in cells)


def row_json(row: Judged) -> str:
    return json.dumps({**asdict(row), "agrees": row.agrees}, ensure_ascii=False)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"
