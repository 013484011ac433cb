"""`terrace judge`: verdicts with their reasons, the summary, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from terrace.cli import main
from terrace.rewards.judging import Judged, summaries, summary_text

ROWS = [
    {"response": "\\boxed{4}", "solution": "4", "right": 1, "family": "easy"},
    {"response": "I do not know", "solution": "4", "right": 0, "family": "hard"},
    {"responses": ["5", "four"], "solution": "4", "expect": 0.5, "family": "hard"},
]


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_rule_on_given_responses(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert main(["judge", "math", path]) == 0
    said = capsys.readouterr().out
    assert "line 1" in said
    assert "1.000  '\\\\boxed{4}' for '4'  ['4': number]" in said
    assert "sandbox: " in said
    table = [line.split() for line in said.split("\n")]
    assert ["all", "4", "0.500", "2", "2", "0"] in [line[:6] for line in table]


def test_expected_verdicts_decide_the_exit_status(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert main(["judge", "math", path, "--expect", "--json"]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [(row["line"], row["value"], row["expected"]) for row in found] == [(3, 0.0, 0.5), (3, 1.0, 0.5)]
    assert main(["judge", "math", write(tmp_path / "right.jsonl", ROWS[:2]), "--expect"]) == 0
    assert main(["judge", "math", write(tmp_path / "none.jsonl", [{"response": "4", "solution": "4"}]), "--expect"]) == 2
    assert "which no row has" in capsys.readouterr().err


def test_rows_that_name_their_rules_and_solutions_that_judge_themselves(tmp_path, capsys):
    rows = [
        {"rule": "counting", "options": {"partial": True}, "response": "3", "solution": "4", "right": 0.75},
        {"rule": "grounding", "options": {"metric": "iou"}, "response": "[0, 0, 4, 8]", "solution": [0, 0, 8, 8], "right": 0.5},
    ]
    assert main(["judge", "-", write(tmp_path / "rows.jsonl", rows), "--expect"]) == 0
    assert main(["judge", "-", write(tmp_path / "rows.jsonl", rows), "--solutions", "--summary"]) == 0
    assert "line" not in capsys.readouterr().out
    assert main(["judge", "counting", write(tmp_path / "bad.jsonl", [{"solution": "many"}]), "--solutions"]) == 2
    assert "line 1: the reward counting cannot read its solution 'many'" in capsys.readouterr().err


def test_the_rewards_of_a_recipe_by_task(tmp_path, capsys):
    recipe = Path(__file__).parents[2] / "jobs" / "recipes" / "demo-morl.yaml"
    path = write(tmp_path / "rows.jsonl", [{"task": "no such task", "response": "4", "solution": "4"}])
    assert main(["judge", str(recipe), path]) == 2
    assert "its task 'no such task' has no reward" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (["{"], [], "line 1: it is not JSON"), (["[1]"], [], "line 1: a row is a JSON object"), ([], [], "there is no row"),
        ([{"solution": "4"}], [], "line 1: it has no `response`"),
        ([{"response": "4", "solution": "4", "right": 7}], [], "is no number in"),
        ([{"response": 4}], [], "it has no `response`"), ([{"response": "4"}], ["a.b=1"], "changes a recipe"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_named(tmp_path, capsys, rows, arguments, message):
    assert main(["judge", "math", write(tmp_path / "rows.jsonl", rows), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unknown_rules_and_missing_files(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert main(["judge", "no_such_rule", path]) == 2
    assert main(["judge", "math", str(tmp_path / "gone.jsonl")]) == 2
    assert main(["judge", "-", path]) == 2
    assert "names no `rule`" in capsys.readouterr().err


def test_the_summary_counts_families():
    rows = [Judged(n, "t", "ab"[n % 2], "r", "s", value, "", n / 1000, expected) for n, (value, expected) in enumerate(
        [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.5, 1.0), (None, 1.0)]
    )]  # fmt: skip
    a, b, everything = summaries(rows)
    assert (a.count, a.full, a.none, a.failures, a.differ, a.paid_too_much) == (3, 2, 0, 1, 2, 1)
    assert (b.count, b.mean, b.differ, b.paid_too_much) == (2, 0.25, 1, 0)
    assert (everything.count, everything.median_ms, everything.p99_ms) == (5, 2.0, 4.0)
    assert len(summary_text([a, b, everything], expecting=True).split("\n")) == 4
