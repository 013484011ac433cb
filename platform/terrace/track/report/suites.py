"""The report's part on suites: every score with its interval, stage by stage, and some answers of each suite's last asking.

It reads what an evaluation leaves in a stage's folder: scores.json, and answers.parquet for the answers alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.track.report.read import RunReport
from terrace.track.report.tables import DASH, table

ANSWERS_SHOWN = 3  # of each suite, right ones and as many wrong ones
TEXT_SHOWN = 300
_RIGHT = ("right", "accuracy", "accuracy@0.5", "relaxed_accuracy", "exact")  # a case's values that are 1 where it is right


@dataclass(frozen=True)
class StageSuites:
    """One stage's evaluation: its number and name, and the `suites` of scores.json."""

    number: int
    name: str
    folder: Path
    suites: Mapping[str, Any]


def read_suites(run: RunReport) -> list[StageSuites]:
    """The evaluations in the stages' folders, in order. Raises InputError naming a file that cannot be read."""
    found = []
    for stage in run.stages:
        folder = run.run_dir / "stages" / f"{stage.number:02d}-{stage.name}" / "evaluation"
        file = folder / "scores.json"
        if not file.is_file():
            continue
        try:
            suites = json.loads(file.read_text(encoding="utf-8"))["suites"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: no scores in it ({error}); run `terrace evaluate` again, or remove it") from error
        found.append(StageSuites(stage.number, stage.name, folder, suites))
    return found


def suites_part(run: RunReport) -> str:
    """HTML of the tables; '' for a run in which nothing was asked."""
    stages = read_suites(run)
    if not stages:
        return ""
    return _scores(stages) + _answers(stages)


def _scores(stages: list[StageSuites]) -> str:
    names = dict.fromkeys((label, score) for stage in stages for label, suite in stage.suites.items() for score in suite["scores"])
    rows = []
    for label, score in names:
        cells = [_score((stage.suites.get(label) or {}).get("scores", {}).get(score)) for stage in stages]
        prints = {suite["fingerprint"] for stage in stages if (suite := stage.suites.get(label))}
        note = "" if len(prints) == 1 else '<small class="failed">different questions: do not compare</small>'
        rows.append([f"<b>{escape(label)}</b>{note}", escape(score), *cells])
    return table(["suite", "score", *(f"{stage.number} {escape(stage.name)}" for stage in stages)], rows, texts=(0, 1))


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return DASH
    return f"<b>{score['value']:.3f}</b><small>{score['low']:.3f} to {score['high']:.3f}, n {score['count']:,}</small>"


def _answers(stages: list[StageSuites]) -> str:
    """Some right and some wrong answers of each suite, from the last stage that was asked."""
    last = {label: stage for stage in stages for label in stage.suites}
    rows = []
    for label, stage in last.items():
        for answer in _examples(stage.folder / "answers.parquet", label):
            good = answer["good"]
            sign = DASH if good is None else '<span class="succeeded">✓</span>' if good else '<span class="failed">✗</span>'
            words = [_cut(answer[key]) for key in ("prompt", "answer", "expected")]
            rows.append([f"<b>{escape(label)}</b><small>{stage.number} {escape(stage.name)}</small>", sign, *words])
    return table(("suite", "", "question", "answer", "expected"), rows, texts=(0, 2, 3, 4))


def _cut(text: str) -> str:
    return escape(text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…")


def _examples(file: Path, label: str) -> list[dict[str, Any]]:
    """The first right and the first wrong cases of a suite, in the suite's order. [] of a suite that only measures."""
    if not file.is_file():
        return []
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["suite", "place", "rotation", "prompt", "answer", "expected", "values"]
    try:
        rows = pq.read_table(file, columns=columns, filters=[("suite", "=", label), ("rotation", "=", 0)]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: no answers in it ({error}); run `terrace evaluate` again, or remove it") from error
    for row in rows:
        values = json.loads(row["values"])
        key = next((key for key in _RIGHT if key in values), None)
        row["good"] = None if key is None else values[key] == 1.0
    rows = [row for row in rows if row["answer"] or row["prompt"]]
    shown = [row for good in (True, False, None) for row in [row for row in rows if row["good"] is good][:ANSWERS_SHOWN]]
    return sorted(shown, key=lambda row: row["place"])
