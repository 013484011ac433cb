"""Weights & Biases: one run for the curriculum and one per stage, in a group of their own, offline unless the environment says more.

Without `WANDB_MODE` nothing leaves the machine: what is written below RUN/wandb goes to a server by `wandb sync`. Of the process only
what Terrace hands over is kept: no console, no code, no command line, no machine, no environment, so no key either.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import wandb

from terrace.track.series import Dated, RunSpec

STEP = "step"  # the axis of all charts: a resumed run's evaluation may come after later steps, which W&B's own counter would drop


class WandbRuns:
    """W&B's runs by the key of their spec, which is their id there: every process of a run directory goes on with the same ones."""

    def __init__(self, folder: Path, project: str):
        self._folder, self._project = folder, project
        self._runs: dict[str, wandb.Run] = {}

    def open_run(self, spec: RunSpec) -> None:
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, disable_code=True, disable_job_creation=True,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
        )  # fmt: skip
        run = wandb.init(
            project=self._project, id=spec.key, name=spec.name, group=spec.parent or spec.key, config=spec.parameters,
            dir=str(self._folder.parent), notes=spec.tags.get("mlflow.note.content"), resume="allow", reinit="create_new",
            settings=settings, mode=os.environ.get("WANDB_MODE", "offline"),
        )  # fmt: skip
        run.define_metric("*", step_metric=STEP)
        self._runs[spec.key] = run

    def send(self, key: str, points: list[Dated]) -> None:
        for step, group in itertools.groupby(points, lambda point: point[3]):
            self._runs[key].log({STEP: step, **{name: value for name, value, _, _ in group}})

    def end_run(self, key: str, status: str) -> None:
        """Waits until all of it is written, or sent."""
        self._runs.pop(key).finish(exit_code=0 if status in ("FINISHED", "SCHEDULED") else 1)


def open_client(folder: Path, project: str, warn: Callable[[str], None]) -> WandbRuns:
    return WandbRuns(folder, project)
