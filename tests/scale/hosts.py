"""Hosts on one machine: processes as srun starts them, a disk for each host, a port of the first that all ask, and an object store."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from processes import free_port

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Hosts:
    """`count` hosts with `ranks` processes each, which run one command on a run that lies on the storage."""

    folder: Path
    count: int
    ranks: int
    environment: dict[str, str]
    running: list[subprocess.Popen] = field(default_factory=list)

    def disk(self, host: int) -> Path:
        """What a host keeps; the run is there only as far as it follows it."""
        return self.folder / f"host-{host}"

    def start(self, *words: str) -> None:
        """The command in every process of every host. No agent of torchrun stands beside them: it would take memory."""
        port = str(free_port())
        for rank in range(self.count * self.ranks):
            host, local = divmod(rank, self.ranks)
            command = [sys.executable, "-m", "terrace.cli", *words, "--launcher", "ranks"]
            environment = self.environment | {
                "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(self.count * self.ranks), "SLURM_LOCALID": str(local),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "XDG_CACHE_HOME": str(self.disk(host)), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            with open(self.folder / f"host-{host}.log", "ab") as log:
                self.running.append(subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, cwd=REPOSITORY, start_new_session=True,
                ))  # fmt: skip

    def wait_until(self, due: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not due():
            ended = [process.poll() for process in self.running if process.poll() is not None]
            assert not ended, f"processes ended with {ended} before; see {self.logs()}"
            assert time.monotonic() < deadline, f"{seconds:.0f} s have passed; see {self.logs()}"
            time.sleep(0.2)

    def finish(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        codes = [process.wait(timeout=max(1.0, deadline - time.monotonic())) for process in self.running]
        self.running.clear()
        assert codes == [0] * len(codes), f"the processes ended with {codes}; {self.logs()}"

    def lose(self) -> None:
        """Every process is killed, and every disk is gone."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        for process in self.running:
            process.wait()
        self.running.clear()
        for host in range(self.count):
            shutil.rmtree(self.disk(host), ignore_errors=True)

    def family(self) -> list[psutil.Process]:
        found = []
        for process in self.running:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        return found

    def logs(self) -> str:
        ends = [(self.folder / f"host-{host}.log").read_text(errors="replace")[-1500:] for host in (0, self.count - 1)]
        return "\n".join(ends)


def rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def available_gigabytes() -> float:
    return psutil.virtual_memory().available / 2**30


def base_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'platform'}", "DS_ACCELERATOR": "cpu"}
