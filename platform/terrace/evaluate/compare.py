"""Two evaluations side by side: what changed, and whether the cases say so.

The difference is paired: both models answered the same cases, so each resampled set of questions is taken from both. That
finds smaller differences than two separate intervals, which may overlap although one model is better on every question
where they differ. Runs of different suites are refused, because their figures do not mean the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.evaluate.metrics import paired_interval
from terrace.evaluate.run import read_results
from terrace.evaluate.suites import KINDS, Row


@dataclass(frozen=True)
class Difference:
    """`second` minus `first` with its paired interval of 95 %. `clear`: the interval does not hold 0."""

    suite: str
    metric: str
    first: float
    second: float
    difference: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        return self.low > 0 or self.high < 0


def compare(first_dir: Path, second_dir: Path) -> list[Difference]:
    """Every score of two evaluations. Raises InputError where they ran different suites."""
    (first, first_rows), (second, second_rows) = read_results(first_dir), read_results(second_dir)
    check_same_suites(first["suites"], second["suites"], str(first_dir), str(second_dir))
    found: list[Difference] = []
    for label, suite in first["suites"].items():
        pair = [_judged(rows, label) for rows in (first_rows, second_rows)]
        both = pair[0].keys() & pair[1].keys()
        rows = [[row for place, row in sorted(one.items()) if place in both] for one in pair]
        if not both:
            raise InputError(f"{label}: no case could be judged in both runs")
        found += _differences(label, suite["kind"], rows[0], rows[1])
    return found


def check_same_suites(first: dict[str, Any], second: dict[str, Any], first_name: str, second_name: str) -> None:
    """Raise InputError unless both ran the same suites, question by question."""
    for label in sorted(first.keys() ^ second.keys()):
        owner, other = (first_name, second_name) if label in first else (second_name, first_name)
        raise InputError(
            f"{owner} ran {label}, {other} did not: these are runs of different suites and are not compared"
        )
    for label in first:
        if first[label]["fingerprint"] != second[label]["fingerprint"]:
            details = ", ".join(
                f"{key} {first[label].get(key)} and {second[label].get(key)}"
                for key in ("cases", "max_new_tokens", "pixels")
                if first[label].get(key) != second[label].get(key)
            )
            raise InputError(
                f"{label} is not the same suite in {first_name} and {second_name}"
                f" ({details or 'its questions, pictures or expected answers differ'}): run both on one file with one --limit"
            )


def _judged(rows: Sequence[Row], label: str) -> dict[int, Row]:
    return {row.place: row for row in rows if row.suite == label and row.failure is None}


def _differences(label: str, kind: str, first: list[Row], second: list[Row]) -> list[Difference]:
    """Differences of one suite over the cases that could be judged in both runs."""
    before, after = KINDS[kind].statistics(first), KINDS[kind].statistics(second)
    found = []
    for name, statistic in before.items():
        values = [float(one.figure(one.parts.sum(axis=0))) for one in (statistic, after[name])]
        low, high = paired_interval(statistic, after[name])
        found.append(Difference(label, name, values[0], values[1], values[1] - values[0], low, high))
    return found
