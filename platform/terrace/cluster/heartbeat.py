"""Signs of life of training processes, as files in the stage's directory: who may still be writing there.

A worker leaves `attempts/<NNN>/alive-<rank>.json` (host, process, Ray node) and touches it every two seconds until it
ends. A controller that comes back after a crash thereby sees workers that outlived the one before, and waits for them
or ends them before it starts others. On the same machine the process table decides; elsewhere a machine none of whose workers' heartbeats
this process has seen change for 20 seconds of its own clock is taken for dead with all of them: to a storage one worker speaks for the
machine.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from terrace.cluster.attempt_files import read_json, write_atomic
from terrace.cluster.seen import unchanged_since

BEAT_SECONDS = 2.0
DEAD_AFTER_SECONDS = 20.0


@dataclass(frozen=True)
class WorkerProcess:
    stage: str
    attempt: int
    rank: int
    host: str
    pid: int
    started: float
    node_id: str
    path: Path


class Heartbeat:
    """Context manager around a worker's whole life."""

    def __init__(self, stage_dir: Path, stage: str, attempt: int, rank: int, node_id: str):
        self._path = stage_dir / "attempts" / f"{attempt:03d}" / f"alive-{rank:04d}.json"
        self._content = {
            "stage": stage,
            "attempt": attempt,
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "node_id": node_id,
        }
        self._end = threading.Event()

    def __enter__(self) -> Heartbeat:
        write_atomic(self._path, json.dumps(self._content))
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            os.utime(self._path)


def live_processes(run_dir: Path) -> list[WorkerProcess]:
    """Workers of this run that may still run, whoever started them."""
    found = []
    for path in sorted(Path(run_dir).glob("stages/*/attempts/*/alive-*.json")):
        content = read_json(path)
        if content is not None:
            found.append(WorkerProcess(**content, path=path))
    beating = {_machine(process) for process in found if process.host != socket.gethostname() and _beats(process)}
    return [process for process in found if _machine(process) in beating or _same_process_here(process)]


def _machine(process: WorkerProcess) -> tuple[str, Path]:
    """The workers that one heartbeat stands for."""
    return process.host, process.path.parent


def _beats(process: WorkerProcess) -> bool:
    try:
        return time.time() - unchanged_since(process.path) < DEAD_AFTER_SECONDS
    except FileNotFoundError:
        return False


def _same_process_here(process: WorkerProcess) -> bool:
    return process.host == socket.gethostname() and _same_process(process) is not None


def _same_process(process: WorkerProcess) -> psutil.Process | None:
    """The process of that number, if it is the one that left the heartbeat and not a later one."""
    try:
        found = psutil.Process(process.pid)
        same = abs(found.create_time() - process.started) < 2.0 and found.status() != psutil.STATUS_ZOMBIE
        return found if same else None
    except psutil.NoSuchProcess:
        return None


def end_processes(processes: list[WorkerProcess]) -> None:
    """SIGKILL the workers on this machine; on other machines through Ray, where this process is connected to it."""
    for process in processes:
        if process.host == socket.gethostname():
            found = _same_process(process)
            if found is not None:
                found.send_signal(signal.SIGKILL)
        else:
            _end_on_node(process)


def _end_on_node(process: WorkerProcess) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        return  # its heartbeat ends by itself once its driver is gone; until then nothing new is started
    strategy = NodeAffinitySchedulingStrategy(process.node_id, soft=True)
    ray.remote(num_cpus=0, scheduling_strategy=strategy)(end_processes).remote([process])
