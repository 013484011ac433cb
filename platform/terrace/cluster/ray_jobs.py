"""The launcher for a running Ray cluster: every stage attempt is one job of the Ray Jobs API, and the controller may come and go.

The job's id names run, stage and attempt, so submitting is create-or-adopt: a controller that was killed after it had submitted
finds its job again. The run directory must be at the same path for the controller and the cluster (shared storage); requests to
stop, outcomes and metrics are small files there, and Ray is asked only for the job's state. An address behind token
authentication needs `RAY_AUTH_MODE=token` and `RAY_AUTH_TOKEN` (or a token file), as every Ray client does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from terrace.cluster import attempt_files as files
from terrace.cluster import attempt_outcome as outcomes
from terrace.cluster.attempt import AttemptObservation, LaunchRequest
from terrace.cluster.attempt_outcome import stage_result
from terrace.cluster.heartbeat import end_processes, live_processes
from terrace.errors import InputError, TerraceError
from terrace.storage import mirror
from terrace.storage.run_layout import stage_directory
from terrace.track.follow import last_row

LOGGER = logging.getLogger(__name__)
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
SUBMIT_PATIENCE_SECONDS = 300.0  # how long a cluster may refuse a job for reasons of its own
LOOK_SECONDS = 1.0  # the dashboard is asked at most this often about a job


class ClusterUnreachable(TerraceError):
    """The Ray cluster's dashboard does not answer."""


class RayJobsLauncher:
    """Runs attempts as jobs. `program` is what the cluster runs, before the recipe's path and the attempt."""

    name = "ray"

    def __init__(self, address: str | None = None, program: Sequence[str] | None = None):
        self._address = address or _dashboard_address()
        # A cluster on this machine was started from this environment more often than from the system's Python.
        here = any(host in self._address for host in ("//127.0.0.1", "//localhost"))
        self._program = list(program or (sys.executable if here else "python", "-m", "terrace.cli", "run"))
        self._names: dict[str, tuple[str, int]] = {}  # job id -> (stage, attempt)
        self._client: Any = None
        self._refused: dict[str, float] = {}  # job id -> since when the cluster has not accepted it
        self._seen: dict[str, tuple[float, str | None, str]] = {}  # job id -> (when, status or None for unknown, message)

    def attach(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir).absolute()
        try:
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(self._address)
        except ConnectionError as error:
            raise ClusterUnreachable(
                f"no Ray cluster answers at {self._address}; start one with `ray start --head`, or name its dashboard by --address"
            ) from error

    def launch(self, request: LaunchRequest) -> None:
        job = self.job_id(request.stage_index, request.stage, request.attempt)
        files.claim_attempt(stage_directory(request.run_dir, request.stage_index, request.stage), request.attempt)
        place = mirror.place_of(request.run_dir)
        mirror.flush(request.run_dir)
        command = [*self._program, f"{place}/recipe.yaml", "--run-dir", place]
        command += ["--stage", request.stage, "--attempt", str(request.attempt)]
        try:
            self._client.submit_job(
                entrypoint=shlex.join(command), submission_id=job, entrypoint_num_cpus=0, runtime_env=self._environment(),
                metadata={"terrace_run": place, "stage": request.stage, "attempt": str(request.attempt)},
            )  # fmt: skip
        except (RuntimeError, ConnectionError) as error:
            # Submitted before this controller was killed, or twice because the answer was lost: it is ours, by its name.
            if self._status(job, fresh=True)[0] is None:
                self._refused_now(job, error)
                return
        self._refused.pop(job, None)
        self._seen.pop(job, None)

    def _refused_now(self, job: str, error: Exception) -> None:
        """A cluster that has just started, or is busy, takes no job yet: the controller asks again as long as the attempt is absent."""
        since = self._refused.setdefault(job, time.monotonic())
        passing = isinstance(error, ConnectionError) or "status code 5" in str(error) or "try again" in str(error)
        if not passing or time.monotonic() - since > SUBMIT_PATIENCE_SECONDS:
            raise ClusterUnreachable(f"{self._address}: the job {job} was not accepted: {_first_line(error)}") from error
        LOGGER.info("%s: the job %s is not accepted yet: %s", self._address, job, _first_line(error))
        time.sleep(LOOK_SECONDS)

    def observe(self, stage_index: int, stage: str, attempt: int) -> AttemptObservation:
        folder = stage_directory(self._run_dir, stage_index, stage)
        status, message = self._status(self.job_id(stage_index, stage, attempt))
        live = (stage, attempt) in self.live_attempts()
        if status is not None and status not in ENDED:
            row = last_row(folder / "metrics.jsonl")
            return AttemptObservation(stage, attempt, "running", live=True, step=row["step"] if row else None,
                                      progress_at=outcomes.progress_time(folder))  # fmt: skip
        if result := stage_result(folder):
            return AttemptObservation(stage, attempt, "succeeded", live=live, result=result)
        if seen := outcomes.outcome(folder, stage, attempt):
            return seen
        if status is None:
            return AttemptObservation(stage, attempt, "absent")
        if status == "STOPPED" or "143" in message:
            return AttemptObservation(stage, attempt, "preempted", message="the job was stopped")
        exit_2 = "exit code 2" in message
        return AttemptObservation(stage, attempt, "failed", failure="input" if exit_2 else "infrastructure",
                                  reason="InputWrong" if exit_2 else "JobFailed", message=message)  # fmt: skip

    def live_attempts(self) -> list[tuple[str, int]]:
        """Attempts whose job has not ended (of those this process knows) or whose workers still leave heartbeats."""
        live = {(process.stage, process.attempt) for process in live_processes(self._run_dir)}
        for job, (_, status, _) in self._seen.items():
            if status is not None and status not in ENDED:
                live.add(self._names[job])
        return sorted(live)

    def stop(self, stage_index: int, stage: str, attempt: int, reason: str, force: bool) -> None:
        if not force:
            files.request_stop(stage_directory(self._run_dir, stage_index, stage), attempt, reason)
            return
        job = self.job_id(stage_index, stage, attempt)
        try:
            self._client.stop_job(job)
        except (RuntimeError, ConnectionError) as error:
            LOGGER.debug("job %s could not be stopped: %s", job, error)
        end_processes([process for process in live_processes(self._run_dir) if (process.stage, process.attempt) == (stage, attempt)])
        self._seen.pop(job, None)
        self._status(job)

    def close(self) -> None:
        """Nothing of the cluster's is ours to end."""

    def job_id(self, stage_index: int, stage: str, attempt: int) -> str:
        """The same for every controller of the run: its directory's digest, the stage's number, the attempt's."""
        digest = hashlib.sha256(mirror.place_of(self._run_dir).encode()).hexdigest()[:10]
        job = f"terrace-{digest}-s{stage_index + 1:02d}-{attempt}"
        self._names[job] = (stage, attempt)
        return job

    def _status(self, job: str, fresh: bool = False) -> tuple[str | None, str]:
        """(status, message) of a job; status None where the cluster knows no such job. An unreachable cluster says nothing new."""
        when, status, message = self._seen.get(job, (0.0, "PENDING", ""))
        if not fresh and job in self._seen and (time.monotonic() - when < LOOK_SECONDS or status in ENDED):
            return status, message
        try:
            found = self._client.get_job_info(job)
            status, message = str(getattr(found.status, "value", found.status)), found.message or ""
            if status in ENDED:
                mirror.refresh(self._run_dir)  # what the job wrote last
        except RuntimeError as error:
            if "404" not in str(error) and "does not exist" not in str(error):
                LOGGER.warning("%s: %s", self._address, _first_line(error))
            else:
                status, message = None, ""
        except ConnectionError as error:
            LOGGER.warning("%s does not answer: %s", self._address, _first_line(error))
        self._seen[job] = (time.monotonic(), status, message)
        return status, message

    def _environment(self) -> dict[str, Any]:
        """What the job needs beyond the cluster's own environment: our package, where it is not installed."""
        package = Path(__file__).resolve().parents[1]
        try:
            importlib.metadata.distribution("terrace")
            return {}
        except importlib.metadata.PackageNotFoundError:
            return {"py_modules": [str(package)]}


def _dashboard_address() -> str:
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_DASHBOARD_ADDRESS") or DEFAULT_ADDRESS
    if not address.startswith(("http://", "https://")):
        raise InputError(f"the Ray cluster's dashboard address must be a URL, for example {DEFAULT_ADDRESS}; it is {address}")
    return address


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
