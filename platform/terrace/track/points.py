"""Rows of metrics.jsonl and results of stages as the points of charts: pure, whoever draws them.

A stage has each number of its rows under its own steps. The curriculum has the few that make sense over all stages, under steps that
are counted on from stage to stage. Evaluations are lines: `eval/caption/loss` before the stage, wherever it was measured, and after it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

Point = tuple[str, float]
MARKER = "loss"  # in every step of a stage's run, so its newest step is the store's position
STAGE_MARKER = "stage"  # the same of a curriculum's run: which stage (from 1) a step belongs to
_NO_NAME = re.compile(r"[^\w\-. :/]", re.ASCII)
LONGEST_NAME = 250


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> `[("a.b", 1)]`; lists by index; nothing for None."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        return [pair for index, item in enumerate(value) for pair in flatten(item, f"{prefix}.{index}")]
    return [] if value is None else [(prefix, value)]


def stage_points(row: dict[str, Any]) -> list[Point]:
    """One step's numbers (`learning_rate/vision`), the marker always among them."""
    points = list(_numbers({key: value for key, value in row.items() if key not in ("step", "time", "evaluation")}))
    seconds, waited = row.get("step_seconds"), row.get("data_wait_seconds")
    if seconds and waited is not None:
        points.append(("data_wait_share", waited / seconds))
    if MARKER not in dict(points):  # a loss that is not finite: the step's place must still be in the store
        points.append((MARKER, float("nan")))
    return points + evaluation_points(row.get("evaluation"))


def curriculum_points(row: dict[str, Any], stage: int, suffix: str = "") -> list[Point]:
    """What the curriculum's own charts show of a step: the stage it belongs to, its loss, speed, rewards per task and evaluations."""
    chosen: dict[str, Any] = {STAGE_MARKER: stage} | {key: row[key] for key in (MARKER, "tokens_per_second") if key in row}
    chosen["reward"] = {task: figures.get("reward") for task, figures in (row.get("tasks") or {}).items() if isinstance(figures, dict)}
    return [(name + suffix, value) for name, value in [*_numbers(chosen), *evaluation_points(row.get("evaluation"))]]


def evaluation_points(evaluation: dict[str, Any] | None) -> list[Point]:
    """`{"caption": 1.5, "reward/counting": 0.5}` -> `eval/caption/loss`, `eval/reward/counting`, as gates name them."""
    return [(f"eval/{name}" if "/" in name else f"eval/{name}/loss", value) for name, value in _numbers(evaluation or {})]


def _numbers(value: dict[str, Any]) -> Iterator[Point]:
    for key, number in flatten(value):
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
            yield metric_name(key.replace(".", "/")), float(number)


def metric_name(name: str) -> str:
    """A name that every store takes: letters, digits and `_-. :/`, no empty part, at most 250 characters."""
    parts = [part for part in _NO_NAME.sub("_", name).split("/") if part.strip(". ")]
    return "/".join(parts)[:LONGEST_NAME] or "unnamed"
