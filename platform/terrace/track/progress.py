"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere (a log file, CI, `ray job logs`).

Both show the same facts: stage k of n, step, loss, tokens per second, remaining time. Plain lines come at most every
few seconds, and always for a stage's first and last step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_SECONDS = 5.0


@dataclass
class _Stage:
    number: int
    count: int
    name: str
    total_steps: int | None
    first_step: int | None = None
    first_time: float = 0.0
    last_row: dict[str, Any] = field(default_factory=dict)


class Display:
    """One per run. `terminal` None: bars if the output is a terminal."""

    def __init__(self, output: TextIO | None = None, terminal: bool | None = None, clock: Callable[[], float] = time.monotonic):
        self._output = output or sys.stdout
        self._terminal = self._output.isatty() if terminal is None else terminal
        self._clock = clock
        self._stage: _Stage | None = None
        self._printed = -PLAIN_SECONDS
        self._task = None
        self._progress: Progress | None = None
        self._console = Console(file=self._output, force_terminal=self._terminal, highlight=False, soft_wrap=True)
        if self._terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                console=self._console,
                refresh_per_second=4,
            )

    def __enter__(self) -> Display:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        self._output.flush()

    def message(self, text: str) -> None:
        """One line that stays."""
        self._console.print(escape(text))
        self._output.flush()

    def activity(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Progress of something that is no training step, for example ingest: named, counted where it can be."""
        if self._progress:
            if self._stage is not None or self._task is None or self._progress.tasks[self._task].description != name:
                self._new_task(name, total)
                self._stage = None
            self._progress.update(self._task, completed=done or 0, total=total)
        elif self._due(finished=done is not None and done == total):
            counted = "" if done is None else f" {done}" + (f"/{total}" if total else "")
            self.message(f"{name}{counted}")

    def stage(self, number: int, count: int, name: str, total_steps: int | None) -> None:
        """A stage attempt begins. `number` from 1."""
        self._stage = _Stage(number, count, name, total_steps)
        self._printed = self._clock() - PLAIN_SECONDS
        if self._progress:
            self._new_task(f"{number}/{count} {name}", total_steps)

    def total(self, total_steps: int) -> None:
        """The stage's number of steps, when it becomes known after its start."""
        if self._stage and self._stage.total_steps != total_steps:
            self._stage.total_steps = total_steps
            if self._progress:
                self._progress.update(self._task, total=total_steps)

    def step(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl."""
        stage = self._stage
        if stage is None:
            return
        now = self._clock()
        if stage.first_step is None or row["step"] < stage.first_step:
            stage.first_step, stage.first_time = row["step"], now
        stage.last_row = row
        facts = self._facts(stage, row, now)
        if self._progress:
            self._progress.update(self._task, completed=row["step"], facts=facts)
        elif self._due(finished=row["step"] == stage.total_steps):
            of = f"/{stage.total_steps}" if stage.total_steps else ""
            self.message(f"stage {stage.number}/{stage.count} {stage.name}  step {row['step']}{of}  {facts}")

    def _facts(self, stage: _Stage, row: dict[str, Any], now: float) -> str:
        facts = [_rewards(row["tasks"])] if row.get("tasks") else []
        if not facts:  # an on-policy loss is about 0 whatever happens: it says nothing beside the rewards
            facts.append("loss not finite" if row["loss"] is None else f"loss {row['loss']:.4f}")
        if row.get("tokens_per_second"):
            facts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
        done = row["step"] - (stage.first_step or 0)
        if stage.total_steps and done > 0:
            remaining = (now - stage.first_time) / done * (stage.total_steps - row["step"])
            facts.append(f"{duration(remaining)} left")
        return "  ".join(facts)

    def _new_task(self, description: str, total: int | None) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._task = self._progress.add_task(description, total=total, facts="")

    def _due(self, finished: bool) -> bool:
        if finished or self._clock() - self._printed >= PLAIN_SECONDS:
            self._printed = self._clock()
            return True
        return False


def _rewards(tasks: dict[str, dict[str, float]]) -> str:
    """Mean reward of every task of an RL iteration, in words."""
    return "reward " + ", ".join(f"{task} {figures['reward']:.3f}" for task, figures in sorted(tasks.items()))


def duration(seconds: float) -> str:
    """`75` -> `1m15s`; the two largest units."""
    seconds = max(0, round(seconds))
    for unit, size, smaller, small_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // small_size:02d}{smaller}"
    return f"{seconds}s"
