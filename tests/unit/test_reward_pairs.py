"""Rewards against a careful person's verdicts: (response, solution) pairs of every family, right and wrong ones.

`reward_pairs.jsonl` is this project's own set; a larger one is judged too where it is present. False positives are listed and
never allowed; false negatives at most 3 % of the right pairs.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from terrace.rewards.sandbox import SandboxPool
from terrace.rewards.types import RewardItem

OWN = Path(__file__).with_name("reward_pairs.jsonl")
MOST_FALSE_NEGATIVES = 0.03


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def judged(rows: list[dict[str, Any]]) -> list[float | None]:
    """Values in the rows' order, judged in batches per rule and options as a stage does."""
    values: list[float | None] = [None] * len(rows)
    groups: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row["rule"], json.dumps(row.get("options", {}))), []).append(place)
    with SandboxPool(workers=2) as pool:
        for (rule, options), places in groups.items():
            items = [RewardItem("", rows[p]["response"], rows[p]["solution"], rows[p].get("metadata", {})) for p in places]
            for place, outcome in zip(places, pool.judge(rule, items, json.loads(options))):
                values[place] = outcome.value
    return values


def mistakes(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(paid for what is wrong, or for more than it is worth; not paid for what is right), each with the pair."""
    paid, unpaid = [], []
    for row, value in zip(rows, judged(rows)):
        said = f"{row['family']}: {row['response']!r} for {row['solution']!r} got {value}, a person gives {row['right']}"
        if value is not None and value > row["right"] + 1e-6:
            paid.append(said)
        if row["right"] > 0 and (value is None or value < row["right"] - 1e-6):
            unpaid.append(said)
    return paid, unpaid


def test_own_pairs_cover_every_family():
    rows = read(OWN)
    families = Counter(row["family"] for row in rows)
    assert len(rows) >= 2300
    assert len(families) >= 35
    assert sum(row["right"] == 0 for row in rows) >= 900


def test_own_pairs_are_judged_as_a_person_would():
    assert mistakes(read(OWN)) == ([], [])


def test_shared_pairs(request):
    path = Path(__file__).parents[3] / "shared" / "cases" / "rewards" / "pairs.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    rows = read(path)
    paid, unpaid = mistakes(rows)
    assert paid == []
    assert len(unpaid) <= MOST_FALSE_NEGATIVES * sum(row["right"] > 0 for row in rows), unpaid
