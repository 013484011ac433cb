"""Ray for this process: connect to the cluster we belong to, or start one on this machine that is large enough for the recipe."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from terrace.cluster.fork_server import called_python, python_of_workers
from terrace.errors import InputError, Preempted
from terrace.recipe.schema import Recipe
from terrace.storage.socket_folder import place_for

LOGGER = logging.getLogger(__name__)
ANSWER_SECONDS = 10.0  # that a cluster has to answer
RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"  # the longest that Ray makes in a temporary folder


def start_ray(recipe: Recipe, dashboard: bool = False, preload: Sequence[str] = ()) -> bool:
    """Connect to the cluster we belong to (`RAY_ADDRESS`, set inside a Ray job too), or start one on this machine.

    A Ray of our own gets at least the logical CPUs that the largest stage asks for (workers, and one per worker for
    decoding), so that a recipe for two workers runs on a small laptop too, and an object store of a tenth of the
    memory, at most 2 GiB. Its workers are forks of a process that has imported `preload` (`fork_server`). True if this call connected to or
    started it.
    """
    for key, value in {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train gives it to its workers, and forks have the variables of all others
    }.items():
        os.environ.setdefault(key, value)
    import psutil
    import ray

    if ray.is_initialized():
        return False
    logging.getLogger("ray").setLevel(logging.ERROR)
    silence_daemons()
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    package = Path(__file__).resolve().parents[1]
    if os.environ.get("RAY_ADDRESS"):
        require_answer(os.environ["RAY_ADDRESS"])
        if not _installed():
            common["runtime_env"] = {"py_modules": [str(package)]}
        try:
            with _own_signal_handlers():
                ray.init(**common)
        except ConnectionError as error:
            raise _no_cluster(os.environ["RAY_ADDRESS"], str(error).partition("\n")[0]) from error
        return True
    if not _installed():
        paths = [str(package.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    needed = 1
    for stage in recipe.stages:
        workers = most_workers(stage.resources.workers)
        held = (workers + stage.rollout_workers) * stage.resources.cpus_per_worker
        needed = max(needed, int(-(-held // 1)) + (stage.resources.decode_cpus or workers))
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine's only node away
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # our actors bring environments, which these lack
    leave_long_folder()
    memory = psutil.virtual_memory().available
    with _own_signal_handlers(), called_python(python_of_workers(preload) if preload else None):
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, needed),
            include_dashboard=dashboard,
            object_store_memory=int(min(2 * 2**30, max(128 * 2**20, memory // 10))),
            **common,
        )
    _end_log_monitor()
    return True


def leave_long_folder() -> None:
    """Ray's sockets lie below `TMPDIR`: /tmp where their names would be too long."""
    if "RAY_TMPDIR" not in os.environ and (place := place_for(RAY_SOCKET)) != tempfile.gettempdir():
        os.environ["RAY_TMPDIR"] = place
        told = "Ray's own files lie in %s/ray: the name of %s is too long for its sockets; RAY_TMPDIR names another folder"
        LOGGER.warning(told, place, tempfile.gettempdir())


def silence_daemons() -> None:
    """What Ray's daemons say of a dead worker is a coloured paragraph on this process's standard error, whatever the level of its log:
    it goes to our log; the sentence for people is the attempt's."""
    from ray._private import worker

    def say(data: dict[str, Any], *_: Any, **__: Any) -> None:
        LOGGER.info("%s: %s", data.get("pid"), " ".join(data.get("lines", [])))

    if hasattr(worker, "print_to_stdstream"):  # no public name of Ray's; without it the paragraph comes back, and nothing else
        worker.print_to_stdstream = say


def _end_log_monitor() -> None:
    """Ray's process that looks ten times a second whether workers have printed something that the driver should see: nobody asked for
    it (`log_to_driver`), their output lies in Ray's folder anyway. Where Ray has no such handle it goes on."""
    import ray._private.worker as worker

    with contextlib.suppress(Exception):
        worker._global_node.kill_log_monitor(check_alive=False)


def require_answer(address: str) -> None:
    """Raise InputError where no cluster listens at its address, or something else does: Ray itself would try for ten minutes."""
    host, colon, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not colon or not port.isdigit():
        return  # `auto`, `local`: Ray looks on this machine, and says at once when there is none
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0" and not _speaks_grpc(connection):
                raise _no_cluster(address, "what listens there is something else; the dashboard's port is not the cluster's")
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(getattr(error, "strerror", None) or error)) from error


def _no_cluster(address: str, why: str) -> InputError:
    return InputError(
        f"RAY_ADDRESS={address}: no Ray cluster answers there ({why}); start it, name another address, or unset RAY_ADDRESS to use this"
        " machine alone"
    )


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether a connection is answered as Ray's servers do: HTTP/2's greeting is followed by a frame of settings (RFC 9113, 3.4)."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    head = b""
    while len(head) < 4 and (more := connection.recv(9)):
        head += more
    return head[3:4] == b"\x04"


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray ends the process with status 15 where SIGTERM reaches it while it starts, and its core puts a handler below Python's that
    aborts on SIGTERM: what was asked for before is put back. Raises Preempted for a signal that came meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        import ray

        ray.shutdown()
        raise Preempted("told to stop while Ray was starting; the same command continues the run") from None
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


def most_workers(workers: int | tuple[int, int]) -> int:
    return workers if isinstance(workers, int) else workers[1]
