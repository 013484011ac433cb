"""The launcher in this process: Ray Train's TorchTrainer, on a Ray of our own or the cluster we belong to.

Each attempt is one `TorchTrainer.fit()` in a thread. Workers receive the stage function as an argument and know
nothing of the curriculum: they get a WorkerContext, look for a stop request in the stage's directory, leave a
heartbeat and, at the end, an outcome there. Step metrics never pass through Ray (a report on every step limits a run
to one step per two seconds); the driver reads metrics.jsonl. Ray Train itself restarts nothing but preempted nodes:
failures are the state machine's to count.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.cluster import attempt as attempts
from terrace.cluster import stop_notice
from terrace.cluster.attempt import AttemptObservation, LaunchRequest
from terrace.cluster.heartbeat import Heartbeat, end_processes, live_processes
from terrace.errors import InputError, Preempted, TerraceError
from terrace.recipe.schema import Recipe
from terrace.storage import mirror
from terrace.storage.files import StorageError
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

    def __init__(self, recipe: Recipe, run_stage: StageFunction, dashboard: bool = False):
        self._recipe, self._run_stage, self._dashboard = recipe, run_stage, dashboard
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
        attempts.claim_attempt(stage_dir, request.attempt)
        if self._started_ray and not ray_lives():
            LOGGER.warning("Ray's raylet on this machine is gone; it is started anew")
            self.close()
        # Not in the attempt's thread: Ray's processes die with the very thread that started them (PR_SET_PDEATHSIG).
        self._started_ray = start_ray(self._recipe, self._dashboard) or self._started_ray
        running = _Running(threading.Thread(target=lambda: None))
        running.thread = threading.Thread(target=self._fit, args=(request, running), name=f"fit-{request.stage}", daemon=True)
        self._running[key] = running
        running.thread.start()

    def observe(self, stage_index: int, stage: str, attempt: int) -> AttemptObservation:
        stage_dir = stage_directory(self._run_dir, stage_index, stage)
        running = self._running.get((stage, attempt))
        alive = running is not None and running.thread.is_alive()
        if not alive and (result := attempts.stage_result(stage_dir)):
            return AttemptObservation(stage, attempt, "succeeded", live=False, result=result)
        if alive:
            row = last_row(stage_dir / "metrics.jsonl")
            return AttemptObservation(
                stage,
                attempt,
                "running",
                live=True,
                step=row["step"] if row else None,
                progress_at=attempts.progress_time(stage_dir),
            )
        return _ended(stage_dir, stage, attempt, running.error if running else None, known=running is not None)

    def live_attempts(self) -> list[tuple[str, int]]:
        live = {key for key, running in self._running.items() if running.thread.is_alive()}
        live |= {(process.stage, process.attempt) for process in live_processes(self._run_dir)}
        return sorted(live)

    def stop(self, stage_index: int, stage: str, attempt: int, reason: str, force: bool) -> None:
        if not force:
            attempts.request_stop(stage_directory(self._run_dir, stage_index, stage), attempt, reason)
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
    if seen := attempts.outcome(stage_dir, stage, attempt):
        return seen
    if not known:
        claimed = attempts.read_json(stage_dir / "attempt.json")
        started = claimed is not None and claimed["attempt"] >= attempt
        return AttemptObservation(stage, attempt, "interrupted" if started else "absent")
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
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return type(cause).__name__, f"rank {rank}: {lines[0] if lines else type(cause).__name__}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return type(error).__name__, lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------- Ray


def start_ray(recipe: Recipe, dashboard: bool = False) -> bool:
    """Connect to the cluster we belong to (`RAY_ADDRESS`, set inside a Ray job too), or start one on this machine.

    A Ray of our own gets at least the logical CPUs that the largest stage asks for (workers, and one per worker for
    decoding), so that a recipe for two workers runs on a small laptop too, and an object store of a tenth of the
    memory, at most 2 GiB. True if this call connected to or started it.
    """
    for key, value in {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(key, value)
    import psutil
    import ray

    if ray.is_initialized():
        return False
    logging.getLogger("ray").setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    package = Path(__file__).resolve().parents[1]
    if os.environ.get("RAY_ADDRESS"):
        if not _installed():
            common["runtime_env"] = {"py_modules": [str(package)]}
        with _own_signal_handlers():
            ray.init(**common)
        return True
    if not _installed():
        paths = [str(package.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    needed = 1
    for stage in recipe.stages:
        workers = _worker_range(stage.resources.workers)[1]
        held = (workers + stage.rollout_workers) * stage.resources.cpus_per_worker
        needed = max(needed, int(-(-held // 1)) + (stage.resources.decode_cpus or workers))
    memory = psutil.virtual_memory().available
    with _own_signal_handlers():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, needed),
            include_dashboard=dashboard,
            object_store_memory=int(min(2 * 2**30, max(128 * 2**20, memory // 10))),
            **common,
        )
    return True


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray's core puts a handler below Python's that aborts the process on SIGTERM: what was asked for before is put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def ray_lives() -> bool:
    """Whether a Ray that this process started can still run anything: its raylet is our child, and a dead one never comes back."""
    if os.environ.get("RAY_ADDRESS"):
        return True  # the cluster's own affair
    import psutil

    children = psutil.Process().children(recursive=True)
    return any(child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE for child in children)


def _installed() -> bool:
    try:
        importlib.metadata.distribution("terrace")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _worker_range(workers: int | tuple[int, int]) -> tuple[int, int]:
    return (workers, workers) if isinstance(workers, int) else (workers[0], workers[1])


def _trainer(recipe: Recipe, request: LaunchRequest, run_stage: StageFunction) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    stage = recipe.stages[request.stage_index]
    resources = stage.resources
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    workers = resources.workers if isinstance(resources.workers, int) else tuple(resources.workers)
    return TorchTrainer(
        _worker,
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
        torch_config=TorchConfig(timeout_s=1800),
    )


def _ray_storage(run_dir: Path) -> dict[str, Any]:
    """Where Ray Train keeps its own small files, which every worker must reach: beside the run, on the run's storage."""
    uri = mirror.uri_of(run_dir)
    if uri is None:
        return {"storage_path": str(Path(run_dir).absolute() / "ray")}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    from terrace.storage.files import s3

    return {"storage_path": f"{uri.removeprefix('s3://')}/ray", "storage_filesystem": PyFileSystem(FSSpecHandler(s3()))}


def _worker(config: dict[str, Any]) -> None:
    """In every Ray Train worker: run the stage, on a stored run's local folder that follows the storage meanwhile."""
    run_dir = mirror.open_run(config["run_dir"])
    mirror.fetch_folder(run_dir / "data", mirror.DATA_LAST)
    with mirror.following(run_dir):
        _run_worker(config, run_dir)


def _run_worker(config: dict[str, Any], run_dir: Path) -> None:
    """Run the stage and leave the outcome where the driver reads it.

    The stage function is called with (recipe, stage_index, run_dir, attempt) and the worker's surroundings by name:
    rank, world_size, local_rank, device, report, should_stop.
    """
    import ray
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, attempt, recipe = context.get_world_rank(), config["attempt"], config["recipe"]
    stage = recipe.stages[config["stage_index"]]
    stage_dir = stage_directory(run_dir, config["stage_index"], stage.name)
    device = str(ray.train.torch.get_device()) if stage.resources.gpus_per_worker else "cpu"
    log_to(stage_dir / "attempts" / f"{attempt:03d}" / f"rank-{rank:04d}.log")
    LOGGER.info(
        "stage %s attempt %d: rank %d of %d on %s, %s, process %d",
        stage.name,
        attempt,
        rank,
        context.get_world_size(),
        socket.gethostname(),
        device,
        os.getpid(),
    )
    outcome: dict[str, Any] = {"rank": rank, "status": "failed"}
    if in_pod():
        stop_notice.begin()
    with Heartbeat(stage_dir, stage.name, attempt, rank, ray.get_runtime_context().get_node_id()):
        try:
            config["run_stage"](
                recipe,
                config["stage_index"],
                run_dir,
                attempt,
                rank=rank,
                world_size=context.get_world_size(),
                local_rank=context.get_local_rank(),
                device=device,
                report=_reporter(stage_dir, rank, attempt),
                should_stop=_stop_watch(stage_dir, attempt),
            )
            outcome["status"] = "succeeded"
        except Preempted as error:
            # Ends like a success for Ray, so that nobody restarts it; the outcome file says what it was.
            outcome.update(status="preempted", message=str(error))
            LOGGER.info("stopped: %s", error)
        except BaseException as error:
            LOGGER.exception("rank %d failed", rank)
            message = str(error) or type(error).__name__
            outcome.update(
                error=type(error).__name__,
                message=message.strip().splitlines()[0]
                if isinstance(error, TerraceError)
                else f"{type(error).__name__}: {message.strip().splitlines()[0]}",
                exit_status=getattr(error, "exit_status", 1),
                traceback=traceback.format_exc(),
                consequence="gloo" in message or "NCCL" in message or "Connection closed by peer" in message,
            )
            raise
        finally:
            attempts.write_outcome(stage_dir, attempt, rank, {**outcome, "time": time.time()})
            if in_pod():
                stop_notice.answer()


def in_pod() -> bool:
    """Whether a preStop hook may leave a notice beside this process."""
    return "TERRACE_STOP_FILE" in os.environ


def _reporter(stage_dir: Path, rank: int, attempt: int) -> Callable[[dict[str, Any], Path | None], None]:
    """Every rank calls it at every checkpoint. One small file says how far the stage is; Ray needs no copy."""

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if rank == 0:
            attempts.check_fence(stage_dir, attempt)  # a newer attempt's progress is not to be overwritten
            content = {**metrics, "checkpoint": str(checkpoint) if checkpoint else None, "time": time.time()}
            attempts.write_atomic(stage_dir / "progress.json", json.dumps(content, default=float))

    return report


def _stop_watch(stage_dir: Path, attempt: int) -> Callable[[], str | None]:
    """Looks for a stop request at most twice a second: two small reads on shared storage are cheap, not free."""
    looked, reason = 0.0, None

    def should_stop() -> str | None:
        nonlocal looked, reason
        if reason is None and time.monotonic() - looked > 0.5:
            looked = time.monotonic()
            reason = attempts.stop_requested(stage_dir, attempt) or (stop_notice.requested() if in_pod() else None)
        return reason

    return should_stop


def log_to(path: Path) -> None:
    """Send this process's log, warnings included, to a file of the attempt as well: `terrace logs` shows these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("terrace").setLevel(logging.INFO)
    logging.captureWarnings(True)
