"""What runs in every worker of an attempt, of Ray Train's or one that a rank started: the stage function, and what it leaves behind.

A worker knows nothing of the curriculum: it gets a WorkerContext, looks for a stop request in the stage's directory, leaves a
heartbeat, a log and, at the end, an outcome there. Step metrics never pass through Ray (a report on every step limits a run to
one step per two seconds); whoever follows reads metrics.jsonl.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.cluster import attempt_files as files
from terrace.cluster import stop_notice
from terrace.cluster.attempt_log import log_to
from terrace.cluster.heartbeat import Heartbeat
from terrace.errors import Preempted, TerraceError, one_line
from terrace.recipe.schema import Stage
from terrace.storage import mirror
from terrace.storage.run_layout import stage_directory

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """Where a worker runs. `node_id` is Ray's, empty without Ray."""

    rank: int
    world_size: int
    local_rank: int
    device: str
    node_id: str = ""


def run_worker(config: dict[str, Any]) -> None:
    """In every Ray Train worker: run the stage on its device."""
    import ray
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    stage = config["recipe"].stages[config["stage_index"]]
    device = str(ray.train.torch.get_device()) if stage.resources.gpus_per_worker else "cpu"
    node_id = ray.get_runtime_context().get_node_id()
    run_surrounded(config, Surroundings(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device, node_id))


def run_surrounded(config: dict[str, Any], place: Surroundings) -> None:
    """Run the stage, on a stored run's local folder that follows the storage meanwhile. Its process group exists already."""
    run_dir = mirror.open_run(config["run_dir"], admitted=True)
    mirror.fetch_folder(run_dir / "data", mirror.DATA_LAST)
    with mirror.following(run_dir):
        _run_worker(config, run_dir, place)


def _run_worker(config: dict[str, Any], run_dir: Path, place: Surroundings) -> None:
    """Run the stage and leave the outcome where the driver reads it.

    The stage function is called with (recipe, stage_index, run_dir, attempt) and the worker's surroundings by name:
    rank, world_size, local_rank, device, report, should_stop.
    """
    rank, attempt, recipe = place.rank, config["attempt"], config["recipe"]
    stage = recipe.stages[config["stage_index"]]
    stage_dir = stage_directory(run_dir, config["stage_index"], stage.name)
    log_to(stage_dir / "attempts" / f"{attempt:03d}" / f"rank-{rank:04d}.log")
    LOGGER.info(
        "stage %s attempt %d: rank %d of %d on %s, %s, process %d",
        stage.name,
        attempt,
        rank,
        place.world_size,
        socket.gethostname(),
        place.device,
        os.getpid(),
    )
    outcome: dict[str, Any] = {"rank": rank, "status": "failed"}
    if in_pod():
        stop_notice.begin()
    with Heartbeat(stage_dir, stage.name, attempt, rank, place.node_id):
        should_stop = _stop_watch(stage_dir, attempt)
        try:
            if place.world_size == 1 and should_stop():  # of several ranks the first step's agreement tells
                raise Preempted(f"stage {stage.name}: told to stop before it began")
            config["run_stage"](
                recipe,
                config["stage_index"],
                run_dir,
                attempt,
                rank=rank,
                world_size=place.world_size,
                local_rank=place.local_rank,
                device=place.device,
                report=reporter(stage_dir, rank, attempt),
                should_stop=should_stop,
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
                message=one_line(message)
                if isinstance(error, TerraceError)
                else f"{type(error).__name__}: {message.strip().splitlines()[0]}",
                exit_status=getattr(error, "exit_status", 1),
                traceback=traceback.format_exc(),
                consequence="gloo" in message or "NCCL" in message or "Connection closed by peer" in message,
            )
            raise
        finally:
            files.write_outcome(stage_dir, attempt, rank, {**outcome, "time": time.time()})
            if in_pod():
                stop_notice.answer()


def in_pod() -> bool:
    """Whether a preStop hook may leave a notice beside this process."""
    return "TERRACE_STOP_FILE" in os.environ


def reporter(stage_dir: Path, rank: int, attempt: int) -> Callable[[dict[str, Any], Path | None], None]:
    """Every rank calls it at every checkpoint. One small file says how far the stage is; Ray needs no copy."""

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if rank == 0:
            files.check_fence(stage_dir, attempt)  # a newer attempt's progress is not to be overwritten
            content = {**metrics, "checkpoint": str(checkpoint) if checkpoint else None, "time": time.time()}
            files.write_atomic(stage_dir / "progress.json", json.dumps(content, default=float))

    return report


def _stop_watch(stage_dir: Path, attempt: int) -> Callable[[], str | None]:
    """Looks for a stop request at most twice a second: two small reads on shared storage are cheap, not free."""
    looked, reason = 0.0, None

    def should_stop() -> str | None:
        nonlocal looked, reason
        if reason is None and time.monotonic() - looked > 0.5:
            looked = time.monotonic()
            reason = files.stop_requested(stage_dir, attempt) or (stop_notice.requested() if in_pod() else None)
        return reason

    return should_stop


def process_group_backend(stage: Stage) -> str | None:
    """What the workers' process group speaks; None: the launcher's choice. FSDP whose shards lie on the host reduces the norm of its
    gradients there, so that group serves both devices."""
    parallel = stage.parallel
    return "cuda:nccl,cpu:gloo" if stage.resources.gpus_per_worker and parallel.strategy == "fsdp" and parallel.on_host else None
