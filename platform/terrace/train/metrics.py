"""`metrics.jsonl`: one JSON object per optimizer step, and never two for the same step, whatever was interrupted.

The tracker sends the same numbers to MLflow. Memory is in bytes, times are in seconds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from terrace.recipe.schema import Stage
from terrace.track.figures import evaluation_mean
from terrace.train.optimizer import part_learning_rates
from terrace.train.step import BatchCounts, StepOutcome


def step_line(
    step: int, counts: BatchCounts, outcome: StepOutcome, stage: Stage, rate_factor: float, seconds: float,
    wait_seconds: float, measured_step: bool = True,
) -> dict[str, Any]:
    """The metrics of a step (from 1). `rate_factor` is the schedule's share of the peak learning rates; `measured_step`: the
    step was training alone, so its speed and memory say something."""
    line: dict[str, Any] = {
        "step": step,
        "loss": outcome.loss if math.isfinite(outcome.loss) else None,
        "supervised_tokens": counts.supervised_tokens,
        "tokens": counts.tokens,
        "samples": counts.samples,
        "learning_rate": part_learning_rates(stage, rate_factor),
        "grad_norm": outcome.grad_norm if math.isfinite(outcome.grad_norm) else None,
        "step_seconds": seconds,
        "data_wait_seconds": wait_seconds,
        "tokens_per_second": counts.tokens / seconds,
        "pack_fill": counts.rows / (counts.packs * stage.sequence_length),
        "samples_per_source": counts.samples_per_source,
        "max_over_mean_cost": counts.max_over_mean_cost,
        "visual_tokens": counts.visual_tokens,
    }
    if measured_step:
        line["samples_per_second"] = counts.samples / seconds
        if outcome.memory_peak_bytes is not None:
            line["memory_peak_bytes"] = outcome.memory_peak_bytes
    if counts.damaged_samples:
        line |= {"damaged_samples": counts.damaged_samples, "replaced_samples": counts.replaced_samples}
    line |= outcome.gradient_noise
    if outcome.skipped:
        line["skipped"] = True
    return line


def measured(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a metrics line under the names that gates use: `train/loss`, `eval/caption/loss`, `eval/loss`;
    `eval/reward/counting` in an RL stage."""
    found = {f"train/{key}": value for key, value in line.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    losses = line.get("evaluation") or {}
    found |= {f"eval/{kind}" if "/" in kind else f"eval/{kind}/loss": value for kind, value in losses.items()}
    if any("/" not in kind for kind in losses):
        found["eval/loss"] = evaluation_mean(losses)
    return {key: float(value) for key, value in found.items() if math.isfinite(value) and key != "train/step"}


class MetricsLog:
    """Appends lines; opening it cuts those beyond `last_step`, which a resumed run will write again."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [line for line in _whole_lines(path) if line["step"] <= last_step]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the stage runs)
        self.last: dict[str, Any] | None = kept[-1] if kept else None

    def append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.last = line

    def sync(self) -> None:
        """Before a checkpoint: the lines up to its step must survive whatever the checkpoint survives."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file; a torn last line is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            value = json.loads(text) if text else None
        except ValueError:
            break
        if isinstance(value, dict):
            lines.append(value)
    return lines
