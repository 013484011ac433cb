"""MLflow, the only file that imports it: brings runs on a tracking server to what Terrace's files say, as often as asked.

Runs are found by their key (a tag), so each is made once; steps by the newest one that the server has, evaluations by their steps, so no
point is written twice. Everything that is sent lies in files, so nothing is lost while the server is away: a call that fails may be made
again, and goes on where the server is. Nothing is sent anywhere but to the tracking URI; MLflow's own telemetry is switched off.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from terrace.track.follow import MetricsFollower
from terrace.track.points import Point, flatten, metric_name
from terrace.track.series import RunSpec, Series, StoreWaitsError, batches

LOGGER = logging.getLogger(__name__)
BATCH_POINTS = 900  # MLflow takes at most 1,000 metrics in one call
LONGEST_TEXT = 500
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # error codes for what was sent, not for the state of the server
MODEL_PLACE = "terrace.place"
_NO_MODEL_NAME = re.compile(r"[^\w\-]", re.ASCII)
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # its lines would land in the middle of the progress display
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # trying again is done here, for as long as it takes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


@dataclass
class Store:
    """One experiment of a tracking server. Every method may raise whatever MLflow raises, and may be called again."""

    uri: str
    experiment: str
    artifact_dir: Path | None = None
    warn: Callable[[str], None] = LOGGER.warning
    system_metrics: bool = False
    _client: Any = None
    _experiment_id: str = ""
    _specs: dict[str, RunSpec] = field(default_factory=dict)
    _ids: dict[str, str] = field(default_factory=dict)
    _positions: dict[tuple[str, str], int] = field(default_factory=dict)  # (run, marker) -> newest step on the server
    _followers: dict[tuple[str, Series], MetricsFollower] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)  # names of metrics that the server does not take
    _monitors: dict[str, Any] = field(default_factory=dict)  # of this machine, by the key of the run that they add to

    def answers(self) -> bool:
        """Whether the server is there, whatever it thinks of what was sent."""
        try:
            self._connected().search_experiments(max_results=1)
        except Exception as error:
            LOGGER.debug("the tracking server does not answer", exc_info=error)
            return False
        return True

    def forget(self) -> None:
        """Look everything up again: the server may have lost or deleted what was known of it."""
        for key in list(self._monitors):
            self._unwatch(key)
        self._experiment_id = ""
        self._ids.clear()
        self._positions.clear()
        self._followers.clear()

    def open_run(self, spec: RunSpec) -> str:
        """Find or make the run, and have it running."""
        self._specs[spec.key] = spec
        run_id = self._run_id(spec.key)
        self._watch(spec.key, run_id)
        return run_id

    def log_rows(self, key: str, series: Series) -> None:
        """What the file has and the server has not."""
        run_id = self._run_id(key)
        self._watch(key, run_id)
        place = (run_id, series.marker)
        if place not in self._positions:
            history = self._client.get_metric_history(run_id, series.marker)
            self._positions[place] = max((point.step for point in history), default=0)
        follower = self._followers.setdefault((run_id, series), MetricsFollower(series.path))
        try:
            for batch, step in batches(follower.rows(), series, self._positions[place], BATCH_POINTS):
                self._send(run_id, [_metric(name, value, at, at_step) for name, value, at, at_step in batch])
                self._positions[place] = step
        except BaseException:
            self._followers.pop((run_id, series), None)  # its rows were read and not sent
            self._positions.pop(place, None)
            raise

    def log_evaluation(self, key: str, points: Iterable[Point], step: int, at: float) -> None:
        """Points of one step, those left out that the server has."""
        run_id = self._run_id(key)
        new = [
            (name, value) for name, value in points if all(point.step != step for point in self._client.get_metric_history(run_id, name))
        ]
        self._send(run_id, [_metric(name, value, at, step) for name, value in new])

    def log_artifact(self, key: str, path: Path) -> None:
        if path.is_file():
            self._client_of(key).log_artifact(self._run_id(key), str(path))

    def log_model(self, key: str, name: str, place: str, step: int) -> None:
        """The run's model by reference: MLflow's pages list it, and the weights stay where they are, at `place`."""
        from mlflow.entities import LoggedModelOutput

        run_id = self._run_id(key)
        experiment = self._experiment()
        made = list(self._client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'", max_results=1))
        tags = {MODEL_PLACE: place, "mlflow.model.isExternal": "true"}
        model = made[0] if made else self._client.create_logged_model(experiment, _NO_MODEL_NAME.sub("_", name), run_id, tags)
        if model.tags.get(MODEL_PLACE) != place:  # the run directory was moved
            self._client.set_logged_model_tags(model.model_id, tags)
        outputs = self._client.get_run(run_id).outputs
        if not any(output.model_id == model.model_id for output in (outputs.model_outputs if outputs else [])):
            self._client.finalize_logged_model(model.model_id, "READY")
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])

    def end_run(self, key: str, status: str, tags: dict[str, str], ended: float | None = None) -> None:
        """`status` is MLflow's: FINISHED, FAILED, KILLED, or SCHEDULED for a run that will go on."""
        run_id = self._run_id(key)
        self._unwatch(key)
        for name, value in tags.items():
            self._client.set_tag(run_id, name, value)
        self._client.set_terminated(run_id, status=status, end_time=_milliseconds(ended))

    def _watch(self, key: str, run_id: str) -> None:
        """MLflow's own monitor adds what this machine does to the curriculum's run, after what an earlier process added."""
        if not self.system_metrics or self._specs[key].parent or key in self._monitors:
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitors[key] = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self.uri)
        self._monitors[key].start()

    def _unwatch(self, key: str) -> None:
        if (monitor := self._monitors.pop(key, None)) is not None:
            monitor.finish()

    # ------------------------------------------------------------ the connection and its runs

    def _connected(self) -> Any:
        if self._client is None:
            for name, value in _SETTINGS.items():
                os.environ.setdefault(name, value)
            from mlflow.tracking import MlflowClient

            for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = MlflowClient(self.uri)
        return self._client

    def _experiment(self) -> str:
        client = self._connected()
        if not self._experiment_id:
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                location = self.artifact_dir.absolute().as_uri() if self.artifact_dir else None
                self._experiment_id = client.create_experiment(self.experiment, artifact_location=location)
            elif found.lifecycle_stage != "active":
                raise StoreWaitsError(
                    f"the experiment `{self.experiment}` was deleted there; restore it (`mlflow experiments restore --experiment-id"
                    f" {found.experiment_id}`), or name another in `tracking.experiment`"
                )
            else:
                self._experiment_id = found.experiment_id
        return self._experiment_id

    def _client_of(self, key: str) -> Any:
        self._run_id(key)
        return self._client

    def _run_id(self, key: str) -> str:
        if key not in self._ids:
            spec = self._specs[key]
            parent = self._run_id(spec.parent) if spec.parent else None
            run = self._found(spec) or self._made(spec, parent)
            if run.info.status != "RUNNING":
                self._client.update_run(run.info.run_id, status="RUNNING")
            if parent and run.data.tags.get("mlflow.parentRunId") != parent:
                self._client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
            self._complete(run, spec)
            self._ids[key] = run.info.run_id
            spec.done(run.info.run_id)
        return self._ids[key]

    def _found(self, spec: RunSpec) -> Any:
        """The run that it had, or that a process made which was killed before it could write the id down."""
        from mlflow.exceptions import MlflowException

        experiment, client = self._experiment(), self._client
        if spec.run_id is not None:
            try:
                run = client.get_run(spec.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run
        found = client.search_runs([experiment], f"tags.`terrace.key` = '{spec.key}'", max_results=1)
        return found[0] if found else None

    def _made(self, spec: RunSpec, parent: str | None) -> Any:
        tags = {"mlflow.runName": spec.name, **spec.tags, "terrace.key": spec.key, **({"mlflow.parentRunId": parent} if parent else {})}
        return self._client.create_run(self._experiment_id, start_time=_milliseconds(spec.started), tags=tags, run_name=spec.name)

    def _complete(self, run: Any, spec: RunSpec) -> None:
        """What the run lacks of its parameters and datasets, as one does that was cut off while it was made. Refused ones are named."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        run_id = run.info.run_id
        named = dict[str, str]()
        for key, value in flatten(spec.parameters):
            name = metric_name(key)
            while name in named:  # two that differ only in what no name may have
                name += "_"
            named[name] = str(value)[:LONGEST_TEXT]
        missing = [Param(name, value) for name, value in named.items() if name not in run.data.params]
        for start in range(0, len(missing), 100):
            batch = missing[start : start + 100]
            if self._refusal(partial(self._client.log_batch, run_id, params=batch)):
                for one in batch:
                    self._name_refusal(f"the parameter {one.key}", partial(self._client.log_batch, run_id, params=[one]))
        known = {item.dataset.name for item in run.inputs.dataset_inputs} if run.inputs else set()
        for dataset in (dataset for dataset in spec.datasets if dataset["name"] not in known):
            inputs = [DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", "training")])]
            self._name_refusal(f"the dataset {dataset['name']}", partial(self._client.log_inputs, run_id, datasets=inputs))

    def _refusal(self, call: Callable[[], object]) -> str:
        """Make a call; why the server does not take what was sent, or nothing. Raises what else befalls it."""
        from mlflow.exceptions import MlflowException

        try:
            call()
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            return str(error).partition("\n")[0]
        return ""

    def _name_refusal(self, what: str, call: Callable[[], object]) -> None:
        if why := self._refusal(call):
            self.warn(f"tracking at {self.uri} does not take {what[:100]} ({why[:300]}); the rest is logged")

    def _send(self, run_id: str, metrics: list[Any]) -> None:
        """Metrics in one transaction; where the server refuses some for what they are, all others, and those are named once."""
        metrics = [metric for metric in metrics if metric.key not in self._refused]
        for start in range(0, len(metrics), BATCH_POINTS):
            batch = metrics[start : start + BATCH_POINTS]
            send = partial(self._client.log_batch, run_id, metrics=batch)
            if self._refusal(send):
                if self._leave_out(run_id, batch):
                    self._send(run_id, batch)
                else:
                    send()

    def _leave_out(self, run_id: str, batch: list[Any]) -> bool:
        """Find the names that the server refuses, one call for each; False where it takes none, so that the fault is another."""
        names = {metric.key: metric for metric in batch}
        answers = {name: self._refusal(partial(self._client.log_batch, run_id, metrics=[metric])) for name, metric in names.items()}
        refused = {name: why for name, why in answers.items() if why}
        if len(refused) in (0, len(names)):
            return False
        self._refused |= set(refused)
        self.warn(f"tracking at {self.uri} does not take {', '.join(refused)} ({next(iter(refused.values()))}); the rest is logged")
        return True


def _metric(name: str, value: float, at: float | None, step: int) -> Any:
    from mlflow.entities import Metric

    return Metric(name, value, _milliseconds(at) or int(time.time() * 1000), step)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)
