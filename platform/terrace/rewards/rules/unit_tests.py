"""Programs by unit tests in groups of difficulty (MiMo-7B, arXiv 2505.07608): easy tests earn little for themselves, hard ones more.

The solution is `{"tests": [...]}`; a test is `{"input": stdin, "output": stdout}` or `{"call": "f(2, 3)", "expect": JSON value}`, with
a `pass_rate` in [0, 1] (of many programs) or a `group` (0 the easiest). Pass rates are cut into `groups` equal ranges, the easiest
first, and the groups that have tests share 1 by their `weights` (equal unless given).
- `scheme: strict`: a group's share counts only if all tests of that and of all easier groups pass.
- `scheme: soft`: a group's share is split equally over its tests, and those that pass count.

Each test runs the program in a process of its own with a time limit, inside the sandbox. What a test expects never enters that
process: it is compared here, so a program cannot answer what it does not compute.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from terrace.rewards.rules.json_answer import same_json
from terrace.rewards.types import Judgement, RewardItem

OUTPUT_BYTES = 1_000_000
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.{1,50000}?)```", re.DOTALL)
_MARK = "\x1eterrace-result\x1e"


@dataclass(frozen=True)
class UnitTest:
    group: int
    stdin: str
    stdout: str | None  # of a program that reads standard input
    call: str | None  # of a program that defines a function
    expect: Any = None


def by_difficulty(
    items: list[RewardItem],
    *,
    scheme: Literal["strict", "soft"] = "strict",
    groups: int = 4,
    weights: Sequence[float] = (),
    seconds_per_test: float = 1.0,
    seconds: float = 4.0,
) -> list[float | None]:
    """Score the last program of each response. `seconds`: of all its tests; keep it below the sandbox' limit for one response."""
    return [_score(item, scheme, groups, weights, seconds_per_test, seconds) for item in items]


by_difficulty.needs_statement = False  # type: ignore[attr-defined] - see rewards.ready: a solution may be tests alone


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    """The solution's own program (`reference`), where it has one."""
    cases_of(item.solution, int(options.get("groups", 4)))
    reference = item.solution.get("reference")
    return f"```python\n{reference}\n```" if isinstance(reference, str) else None


def cases_of(solution: Any, groups: int) -> list[UnitTest]:
    """The tests of a solution, the easiest group first. Raises ValueError naming the test that is none."""
    if isinstance(solution, str):
        solution = json.loads(solution)
    if not isinstance(solution, dict) or not isinstance(solution.get("tests"), list) or not solution["tests"]:
        raise ValueError('the solution is not {"tests": [...]}')
    found = []
    for place, test in enumerate(solution["tests"]):
        if not isinstance(test, dict) or not (
            isinstance(test.get("output"), str) or (isinstance(test.get("call"), str) and "expect" in test)
        ):
            raise ValueError(f'test {place} is neither {{"input", "output"}} nor {{"call", "expect"}}')
        found.append(
            UnitTest(_group(test, place, groups), str(test.get("input", "")), test.get("output"), test.get("call"), test.get("expect"))
        )
    return sorted(found, key=lambda test: test.group)


def _group(test: Mapping[str, Any], place: int, groups: int) -> int:
    if isinstance(test.get("group"), int) and not isinstance(test["group"], bool):
        return test["group"]
    rate = test.get("pass_rate")
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ValueError(f"test {place} has neither `group` nor a `pass_rate` in [0, 1]")
    return min(int((1 - rate) * groups), groups - 1)


def group_shares(tests: Sequence[UnitTest], weights: Sequence[float]) -> dict[int, float]:
    """What each group that has tests is worth; together 1."""
    present = sorted({test.group for test in tests})
    raw = {group: float(weights[group]) if group < len(weights) else 1.0 for group in present}
    total = sum(raw.values())
    if total <= 0:
        raise ValueError("the weights of the groups that have tests are all 0")
    return {group: weight / total for group, weight in raw.items()}


def difficulty_value(tests: Sequence[UnitTest], passed: Sequence[bool], scheme: str, weights: Sequence[float] = ()) -> float:
    """The value of `passed`, test for test (of groups in order)."""
    value = 0.0
    for group, share in group_shares(tests, weights).items():
        mine = [right for test, right in zip(tests, passed) if test.group == group]
        if scheme == "soft":
            value += share * sum(mine) / len(mine)
        elif all(mine):
            value += share
        else:
            break
    return min(value, 1.0)


def _score(
    item: RewardItem, scheme: str, groups: int, weights: Sequence[float], seconds_per_test: float, seconds: float
) -> Judgement | None:
    try:
        tests = cases_of(item.solution, groups)
    except ValueError:
        return None
    program = program_of(item.response)
    if program is None:
        return Judgement(0.0, "", "no program in a code fence")
    deadline, passed, reason = time.monotonic() + seconds, [], ""
    for test in tests:
        left = min(seconds_per_test, deadline - time.monotonic())
        broken = bool(passed) and scheme == "strict" and not all(passed) and test.group > tests[len(passed) - 1].group
        said = "an easier group failed" if broken else "out of time" if left <= 0 else _run(program, test, left)
        passed.append(not said)
        reason = reason or said
    value = difficulty_value(tests, passed, scheme, weights)
    return Judgement(value, program[-300:], f"{sum(passed)} of {len(tests)} tests, {scheme}" + (f"; first: {reason}" if reason else ""))


def program_of(response: str) -> str | None:
    """The last fenced program behind the reasoning, or None."""
    closed = response.rfind("</think>")
    if closed < 0 and "<think>" in response:
        return None
    found = _FENCE.findall(response[closed + len("</think>") if closed >= 0 else 0 :])
    return found[-1] if found else None


def _run(program: str, test: UnitTest, seconds: float) -> str:
    """Why a test fails, or nothing if it passes."""
    code = program
    if test.call is not None:
        code += f"\nimport json as _json\nprint({_MARK!r} + _json.dumps({test.call}))\n"
    with tempfile.TemporaryFile() as said:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-B", "-c", code],
                input=test.stdin.encode(),
                stdout=said,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no end after {seconds:.2g} s"
        except (OSError, ValueError) as error:
            return f"it cannot be run ({error})"
        said.seek(0)
        text = said.read(OUTPUT_BYTES).decode(errors="replace")
    if done.returncode != 0:
        return f"exit status {done.returncode}"
    if test.call is None:
        return "" if _lines(text) == _lines(test.stdout or "") else "another output"
    try:
        value = json.loads(text.rsplit(_MARK, 1)[1])
    except (IndexError, ValueError):
        return "no result"
    return "" if same_json(test.expect, value) else "another result"


def _lines(text: str) -> list[str]:
    """Lines without white space at their ends, and without empty lines at the end."""
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n").split("\n")
