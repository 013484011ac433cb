"""`ray start --head` on ports and in a folder of its own, so that nothing else on this machine takes it for its cluster."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Head:
    """`address` is the dashboard's; `environment` is what a client and the jobs need (paths, the token)."""

    address: str
    environment: dict[str, str]
    process: subprocess.Popen


@contextlib.contextmanager
def ray_head(num_cpus: int = 4, token: bool = False, **variables: str) -> Iterator[Head]:
    """Start one, wait for its dashboard, and end it and everything it started. `token`: clients must show one."""
    temporary = Path(f"/tmp/tr{os.getpid()}{secrets.token_hex(1)}")  # Ray's sockets need a short path
    port = 20000 + (os.getpid() + secrets.randbelow(1000)) % 20000
    paths = os.pathsep.join([str(REPOSITORY / "platform"), str(REPOSITORY / "tests")])
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables,
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    if token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={port + 20000}",
         f"--dashboard-agent-listen-port={port + 1}", f"--ray-client-server-port={port + 2}", f"--num-cpus={num_cpus}",
         "--include-dashboard=true", "--disable-usage-stats", f"--temp-dir={temporary}", f"--object-store-memory={200 * 2**20}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    head = Head(f"http://127.0.0.1:{port + 20000}", environment, process)
    try:
        _await_dashboard(head)
        yield head
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _await_dashboard(head: Head, seconds: float = 300.0) -> None:
    """In a process of its own: a client keeps its token for the life of its process."""
    ask = [sys.executable, "-c", "import sys; from ray.job_submission import JobSubmissionClient as C; C(sys.argv[1]).list_jobs()"]
    deadline = time.monotonic() + seconds
    while subprocess.run([*ask, head.address], env=head.environment, capture_output=True).returncode:
        assert head.process.poll() is None, "ray start ended"
        assert time.monotonic() < deadline, f"no dashboard at {head.address} within {seconds:.0f} s"
        time.sleep(0.5)
