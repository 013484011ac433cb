"""The figures of a stage that every view shows, computed once: status, report, progress, and what gates and charts average.

Everything is measured: a figure that no step recorded is None, never the plan's. A stage is judged by its loss, or, where
rewards are what it learns from, by the reward of its sampled answers; the two are never averaged with each other, nor with the
rewards of greedy answers, which are another measurement of the same thing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Row = Mapping[str, Any]
Measure = Literal["loss", "reward"]
MOST_HEADER_BYTES = 100 * 2**20  # of one file
SAMPLED = "reward/"  # evaluations of sampled answers; those of greedy ones are `greedy_reward/`


@dataclass(frozen=True)
class StageFigures:
    """Of all steps of a stage so far."""

    steps: int
    tokens: int
    samples: int
    seconds: float  # in optimizer steps
    measure: Measure
    last: float | None  # of the newest step; None also where it was not finite
    tokens_per_second: float | None
    flops: float | None  # model FLOPs of the steps that recorded them
    flops_per_second: float | None  # in those steps
    memory_peak_bytes: int | None  # the most that one process held in any step


def stage_figures(rows: Iterable[Row]) -> StageFigures:
    """The figures of the rows of a metrics.jsonl."""
    steps, tokens, samples, seconds, flops, counted, peak = 0, 0, 0, 0.0, 0.0, 0.0, None
    newest: Row = {}
    for row in rows:
        if "reward" in row or "reward" not in newest:  # of an iteration's several updates the first tells its rewards
            newest = row
        steps = int(row["step"])
        tokens += int(_number(row, "tokens") or 0)
        samples += int(_number(row, "samples") or 0)
        taken = _number(row, "step_seconds") or 0.0
        seconds += taken
        if (done := _number(row, "model_flops")) is not None:
            flops, counted = flops + done, counted + taken
        if (held := _number(row, "memory_peak_bytes")) is not None:
            peak = max(peak or 0, int(held))
    return StageFigures(
        steps, tokens, samples, seconds, measure_of(newest), last_measured(newest), tokens / seconds if seconds else None,
        flops if counted else None, flops / counted if counted else None, peak,
    )  # fmt: skip


def measure_of(row: Row) -> Measure:
    """What a step is judged by."""
    return "reward" if "reward" in row else "loss"


def last_measured(row: Row) -> float | None:
    """A step's loss, or the mean reward of what it sampled."""
    return _number(row, measure_of(row))


def evaluation_mean(evaluation: Mapping[str, Any] | None) -> float | None:
    """One number for an evaluation: the mean over the kinds of its losses, or over the tasks of its sampled rewards."""
    values = {name: value for name, value in (evaluation or {}).items() if isinstance(value, int | float)}
    losses = [value for name, value in values.items() if "/" not in name]
    alike = losses or [value for name, value in values.items() if name.startswith(SAMPLED)]
    return sum(alike) / len(alike) if alike else None


def _number(row: Row, key: str) -> float | None:
    value = row.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def parameters_of(folder: Path) -> int | None:
    """Parameters of a Hugging Face directory, from the headers of its safetensors alone; None where there are none to read."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 2 <= size <= MOST_HEADER_BYTES:
                return None
            try:
                header = json.loads(stream.read(size))
            except ValueError:
                return None
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total or None
