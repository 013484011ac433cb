"""Trackers beside MLflow (`tracking.also`), each through its own client: what all of them have in common.

A client writes below `RUN/<tracker>`. Which steps it has is a small file there, since no such client can be asked; so a resumed run
adds what is missing, and a folder that was deleted is filled again from metrics.jsonl. A process that is killed between a client's
write and that file's leaves a few steps twice, with the same values.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from terrace.errors import InputError
from terrace.storage.durable import json_bytes, write_durably
from terrace.track.follow import MetricsFollower
from terrace.track.points import Point
from terrace.track.series import Dated, RunSpec, Series, batches

ALSO = {"tensorboard": "terrace.track.tensorboard_files", "wandb": "terrace.track.wandb_runs", "swanlab": "terrace.track.swanlab_runs"}
INSTALL = {"tensorboard": "tensorboard", "wandb": "'terrace[wandb]'", "swanlab": "'terrace[swanlab]'"}
BATCH_POINTS = 5_000


class Client(Protocol):
    """One tracker of one run directory. Runs are named by the key of their spec."""

    def open_run(self, spec: RunSpec) -> None:
        """Make the run, or go on with what an earlier process made of it."""

    def send(self, key: str, points: list[Dated]) -> None:
        """Add the points, in the order of their steps; on disk or sent when it returns."""

    def end_run(self, key: str, status: str) -> None:
        """`status` as MLflow has it: FINISHED, FAILED, KILLED, or SCHEDULED for a run that will go on."""


def missing_clients(also: Iterable[str]) -> dict[str, str]:
    """What to install for each tracker whose client is not there."""
    return {kind: f"pip install {INSTALL[kind]}" for kind in also if not _installed(kind)}


def _installed(kind: str) -> bool:
    return importlib.util.find_spec(kind) is not None


def require_clients(also: Iterable[str]) -> None:
    """Raise InputError where a client is missing."""
    for kind, install in missing_clients(also).items():
        raise InputError(f"tracking.also: {kind} is not installed here; `{install}` installs its client")


@dataclass
class AlsoStore:
    """As much of `mlflow_store.Store` as the thread that tracks needs, over one client."""

    kind: str
    folder: Path
    client: Client
    _specs: dict[str, RunSpec] = field(default_factory=dict)
    _opened: set[str] = field(default_factory=set)
    _followers: dict[tuple[str, Series], MetricsFollower] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return str(self.folder)

    def answers(self) -> bool:
        """Files and clients with files of their own are always there: what fails is passed over by name."""
        return True

    def forget(self) -> None:
        self._followers.clear()

    def open_run(self, spec: RunSpec) -> None:
        self._specs[spec.key] = spec
        if spec.key not in self._opened:
            self.client.open_run(spec)
            self._opened.add(spec.key)

    def log_rows(self, key: str, series: Series) -> None:
        self.open_run(self._specs[key])
        follower = self._followers.setdefault((key, series), MetricsFollower(series.path))
        place = series.marker
        try:
            known = self._known(key)
            for batch, step in batches(follower.rows(), series, known["steps"].get(place, 0), BATCH_POINTS):
                self._send(key, known, batch)
                known["steps"][place] = step
                self._keep(key, known)
        except BaseException:
            self._followers.pop((key, series), None)  # its rows were read and not sent
            raise

    def log_evaluation(self, key: str, points: Iterable[Point], step: int, at: float) -> None:
        self.open_run(self._specs[key])
        known = self._known(key)
        self._send(key, known, [(name, value, at, step) for name, value in points])
        self._keep(key, known)

    def log_artifact(self, key: str, path: Path) -> None:
        """Files stay in the run directory, and in MLflow."""

    def log_model(self, key: str, name: str, place: str, step: int) -> None:
        """Weights stay in the run directory, and MLflow says where."""

    def end_run(self, key: str, status: str, tags: dict[str, str], ended: float | None = None) -> None:
        self.open_run(self._specs[key])
        self.client.end_run(key, status)
        self._opened.discard(key)

    def _send(self, key: str, known: dict[str, Any], points: list[Dated]) -> None:
        """The points, evaluations only where they are new: the one after a stage may stand in its last row, too."""
        new = []
        for point in points:
            name, _, _, step = point
            if name.startswith("eval/"):
                if step in known["evaluations"].setdefault(name, []):
                    continue
                known["evaluations"][name].append(step)
            new.append(point)
        if new:
            self.client.send(key, new)

    def _known(self, key: str) -> dict[str, Any]:
        try:
            return json.loads(self._known_path(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"steps": {}, "evaluations": {}}

    def _keep(self, key: str, known: dict[str, Any]) -> None:
        write_durably(self._known_path(key), json_bytes(known))

    def _known_path(self, key: str) -> Path:
        return self.folder / f"sent-{key}.json"


def open_also(kind: str, run_dir: Path, project: str, warn: Callable[[str], None]) -> AlsoStore:
    """The tracker of that name. Raises InputError where its client is not installed."""
    require_clients([kind])
    folder = Path(run_dir).absolute() / kind
    folder.mkdir(parents=True, exist_ok=True)
    return AlsoStore(kind, folder, importlib.import_module(ALSO[kind]).open_client(folder, project, warn))
