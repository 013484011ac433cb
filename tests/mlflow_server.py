"""A real `mlflow server` of a test's own, which can be killed, frozen and started again on the same port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from waiting import eventually

START_SECONDS = 240.0


@dataclass
class MlflowServer:
    """`mlflow server` over sqlite. `artifacts`: where it keeps what clients give it; `root`: where clients write themselves instead."""

    folder: Path
    port: int
    artifacts: str = ""
    root: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, wait: bool = True) -> None:
        places = ["--artifacts-destination", self.artifacts or str(self.folder / "artifacts")]
        if self.root:
            places = ["--no-serve-artifacts", "--default-artifact-root", self.root]
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/server.db", *places,
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self.environment}
        with open(self.folder / "server.log", "a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        if wait:
            assert eventually(self.answers, START_SECONDS), (self.folder / "server.log").read_text()[-3000:]

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def signal(self, number: int) -> None:
        """To the server and all its workers: SIGSTOP has it take connections and answer none."""
        os.killpg(self.process.pid, number)

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False

    def client(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.uri)


@contextmanager
def mlflow_server(folder: Path, started: bool = True, **more: Any) -> Iterator[MlflowServer]:
    """A server until the block ends; `started=False` leaves its start to the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    server = MlflowServer(folder, port, **more)
    try:
        if started:
            server.start()
        yield server
    finally:
        server.kill()


def steps(client: Any, run: str, name: str) -> list[int]:
    """The steps of a metric, in the server's order, each as often as it has it."""
    return [point.step for point in client.get_metric_history(run, name)]


def runs_by_name(client: Any, experiment: str) -> dict[str, Any]:
    """The experiment's runs that are not deleted."""
    return {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name(experiment).experiment_id])}
