"""The launcher in this process: Ray Train's TorchTrainer, on a Ray of our own or the cluster we belong to.

Each attempt is one `TorchTrainer.fit()` in a thread; what its workers do is `local_worker`. Ray Train itself restarts nothing but
preempted nodes: failures are the state machine's to count.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.cluster import attempt_files as files
from terrace.cluster import attempt_outcome as outcomes
from terrace.cluster.attempt import AttemptObservation, LaunchRequest
from terrace.cluster.heartbeat import end_processes, live_processes
from terrace.cluster.local_worker import process_group_backend, run_worker
from terrace.cluster.start_ray import ray_lives, start_ray
from terrace.errors import InputError
from terrace.recipe.schema import Recipe
from terrace.storage import mirror
from terrace.storage.faults import StorageError
from terrace.storage.run_layout import stage_directory
from terrace.track.follow import last_row

LOGGER = logging.getLogger(__name__)
StageFunction = Callable[..., Any]  # curriculum.attempt_worker.run_in_worker(recipe, stage_index, run_dir, attempt, rank=..., ...)


@dataclass
class _Running:
    thread: threading.Thread
    error: BaseException | None = None


class LocalLauncher:
    """Runs attempts on Ray from this process. One at a time."""

    name = "local"

    def __init__(self, recipe: Recipe, run_stage: StageFunction, dashboard: bool = False, preload: Sequence[str] = ()):
        """`preload`: modules that workers import, for a Ray that is started here."""
        self._recipe, self._run_stage, self._dashboard, self._preload = recipe, run_stage, dashboard, preload
        self._running: dict[tuple[str, int], _Running] = {}
        self._run_dir: Path | None = None
        self._started_ray = False

    def attach(self, run_dir: Path) -> None:
        """The run directory whose attempts this launcher looks after."""
        self._run_dir = Path(run_dir).absolute()

    def launch(self, request: LaunchRequest) -> None:
        key = (request.stage, request.attempt)
        if key in self._running:
            return
        stage_dir = stage_directory(request.run_dir, request.stage_index, request.stage)
        files.claim_attempt(stage_dir, request.attempt)
        if self._started_ray and not ray_lives():
            LOGGER.warning("Ray's raylet on this machine is gone; it is started anew")
            self.close()
        # Not in the attempt's thread: Ray's processes die with the very thread that started them (PR_SET_PDEATHSIG).
        self._started_ray = start_ray(self._recipe, self._dashboard, self._preload) or self._started_ray
        running = _Running(threading.Thread(target=lambda: None))
        running.thread = threading.Thread(target=self._fit, args=(request, running), name=f"fit-{request.stage}", daemon=True)
        self._running[key] = running
        running.thread.start()

    def observe(self, stage_index: int, stage: str, attempt: int) -> AttemptObservation:
        stage_dir = stage_directory(self._run_dir, stage_index, stage)
        running = self._running.get((stage, attempt))
        alive = running is not None and running.thread.is_alive()
        if not alive and (result := outcomes.stage_result(stage_dir)):
            return AttemptObservation(stage, attempt, "succeeded", live=False, result=result)
        if alive:
            row = last_row(stage_dir / "metrics.jsonl")
            return AttemptObservation(
                stage,
                attempt,
                "running",
                live=True,
                step=row["step"] if row else None,
                progress_at=outcomes.progress_time(stage_dir),
            )
        return _ended(stage_dir, stage, attempt, running.error if running else None, known=running is not None)

    def live_attempts(self) -> list[tuple[str, int]]:
        live = {key for key, running in self._running.items() if running.thread.is_alive()}
        live |= {(process.stage, process.attempt) for process in live_processes(self._run_dir)}
        return sorted(live)

    def stop(self, stage_index: int, stage: str, attempt: int, reason: str, force: bool) -> None:
        if not force:
            files.request_stop(stage_directory(self._run_dir, stage_index, stage), attempt, reason)
            return
        end_processes([process for process in live_processes(self._run_dir) if (process.stage, process.attempt) == (stage, attempt)])

    def close(self) -> None:
        """End the connection to Ray that a launch made, and the Ray it started; one that was there before stays."""
        if self._started_ray:
            import ray

            ray.shutdown()

    def _fit(self, request: LaunchRequest, running: _Running) -> None:
        """In the attempt's thread: everything that goes wrong becomes the attempt's error."""
        try:
            _trainer(self._recipe, request, self._run_stage).fit()
        except BaseException as error:
            running.error = error
            LOGGER.debug("attempt %s of %s ended", request.attempt, request.stage, exc_info=error)
        try:
            mirror.refresh(request.run_dir)  # the result of a worker on another machine, before this thread counts as ended
        except StorageError as error:
            running.error = running.error or error


def _ended(stage_dir: Path, stage: str, attempt: int, error: BaseException | None, known: bool) -> AttemptObservation:
    """How an attempt without a result ended, from what its ranks wrote and what Ray says."""
    if seen := outcomes.outcome(stage_dir, stage, attempt):
        return seen
    if not known:
        return outcomes.unknown(stage_dir, stage, attempt)
    if isinstance(error, InputError):
        return AttemptObservation(stage, attempt, "failed", failure="input", reason="InputWrong", message=str(error))
    if error is None:
        message = "the workers ended without a result"
        return AttemptObservation(stage, attempt, "failed", failure="program", reason="NoResult", message=message)
    reason, message = _describe(error)
    return AttemptObservation(stage, attempt, "failed", failure="infrastructure", reason=reason, message=message)


def _describe(error: BaseException) -> tuple[str, str]:
    """The worker's death in one line, without Ray's pages of advice."""
    causes = list(getattr(error, "worker_failures", {}).items())
    if causes:
        rank, cause = causes[0]
        if (seen := getattr(cause, "health_check_failure", None)) is not None:
            told = next((line.strip() for line in str(seen).splitlines() if line.strip()), "")
            return type(seen).__name__, f"rank {rank}: its process was killed, ran out of memory or does not answer ({told.rstrip('.')})"
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return type(cause).__name__, f"rank {rank}: {lines[0] if lines else type(cause).__name__}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return type(error).__name__, lines[0] if lines else type(error).__name__


def _trainer(recipe: Recipe, request: LaunchRequest, run_stage: StageFunction) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    stage = recipe.stages[request.stage_index]
    resources = stage.resources
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    workers = resources.workers if isinstance(resources.workers, int) else tuple(resources.workers)

    class Trainer(TorchTrainer):
        """Without the actors of Ray Train that have nothing to do here, each a process that imports Ray in every attempt."""

        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in needless_callbacks()]

    return Trainer(
        run_worker,
        train_loop_config={
            "run_stage": run_stage,
            "recipe": recipe,
            "stage_index": request.stage_index,
            "run_dir": mirror.place_of(request.run_dir),
            "attempt": request.attempt,
        },
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker),
        run_config=ray.train.RunConfig(
            name=f"{request.stage}-{request.attempt:03d}",
            **_ray_storage(request.run_dir),
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, preemption_grace_s=stage.failure.preemption_grace_seconds
            ),
        ),
        torch_config=TorchConfig(backend=process_group_backend(stage), timeout_s=1800),
    )


def needless_callbacks() -> set[str]:
    """Classes of Ray Train's own callbacks: of the data path, which is ours; on a Ray of our own also of the cleaner that gives a dead
    driver's placement group back to the cluster, which ends with the driver. One that Ray no longer has by that name stays."""
    return {"DatasetsCallback"} | (set() if os.environ.get("RAY_ADDRESS") else {"PlacementGroupCleanerCallback"})


def _ray_storage(run_dir: Path) -> dict[str, Any]:
    """Where Ray Train keeps its own small files, which every worker must reach: beside the run, on the run's storage."""
    uri = mirror.uri_of(run_dir)
    if uri is None:
        return {"storage_path": str(Path(run_dir).absolute() / "ray")}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    from terrace.storage.s3 import s3

    return {"storage_path": f"{uri.removeprefix('s3://')}/ray", "storage_filesystem": PyFileSystem(FSSpecHandler(s3()))}
