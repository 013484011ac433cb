"""SwanLab: one experiment for the run directory, with a section of charts for each stage, offline unless the environment says more.

Its client keeps one experiment at a time in a process, so stages are sections of the curriculum's (`01-sft/loss`). Without `SWANLAB_MODE`
nothing leaves the machine: what is written below RUN/swanlab goes to a server by `swanlab sync`. Of the process only what Terrace hands
over is kept: no console, no machine, no packages, no command line.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import swanlab

from terrace.track.series import Dated, RunSpec

ENDS = {"FINISHED": "success", "FAILED": "crashed", "SCHEDULED": "aborted", "KILLED": "aborted"}


class SwanLabRuns:
    """The experiment of the curriculum's run, and the sections of its stages' runs by the key of their specs."""

    def __init__(self, folder: Path, project: str):
        self._folder, self._project = folder, project
        self._run: Any = None
        self._sections: dict[str, str] = {}

    def open_run(self, spec: RunSpec) -> None:
        self._sections[spec.key] = f"{spec.name}/" if spec.parent else ""
        if self._run is None:
            self._run = self._experiment(spec)
        if spec.parent:
            self._run.config.update({spec.name: spec.parameters})

    def send(self, key: str, points: list[Dated]) -> None:
        section = self._sections[key]
        for step, group in itertools.groupby(points, lambda point: point[3]):
            self._run.log({section + name: value for name, value, _, _ in group}, step=step)

    def end_run(self, key: str, status: str) -> None:
        """The curriculum's end is the experiment's; waits until all of it is written, or sent."""
        if self._sections.pop(key) or self._run is None:
            return
        ended, self._run = self._run, None
        ended.finish(state=ENDS[status], error="a stage failed" if status == "FAILED" else None)

    def _experiment(self, spec: RunSpec) -> Any:
        mode = os.environ.get("SWANLAB_MODE", "offline")
        private = swanlab.Settings.Probe(hardware=False, runtime=False, requirements=False, git=False, swanlab=False, monitor=False)
        settings = swanlab.Settings(interactive=False, probe=private, terminal=swanlab.Settings.Terminal(proxy_type="none"))
        return swanlab.init(
            project=self._project, name=spec.name, description=spec.tags.get("mlflow.note.content"), config=spec.parameters,
            log_dir=str(self._folder), mode=mode, settings=settings, id=spec.parent or spec.key,
            resume="allow",  # in offline mode each process leaves a folder of its own, which `swanlab sync` joins by their id
        )  # fmt: skip


def open_client(folder: Path, project: str, warn: Callable[[str], None]) -> SwanLabRuns:
    return SwanLabRuns(folder, project)
