"""A process that has imported what Ray's workers import, and forks one whenever Ray wants one: on this machine's own Ray, on Linux.

An attempt has processes of its own so that memory and CUDA end with it, and each of them would import Ray, torch and transformers anew,
five seconds of a core. A fork has them at once and shares their pages with the others. The server runs no thread of its own, starts no
work and touches no GPU; each worker is a process like any other to Ray, to the process table and to whoever kills it. On a machine with
GPUs this has not run yet, so there it is done only where it is asked for.

Ray's core reads its variables when it is imported, so the server takes those of the first worker that is wanted, and imports Ray then; a
worker with other variables is not forked. Nor is one whose environment (`runtime_env`) has more than variables, or any on a cluster.

    python_of_workers(modules)     # in the process that starts Ray: what Ray is to call as Python, or None
    python -P -m terrace.cluster.fork_server SOCKET FOLDER MODULE...
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from terrace.storage.socket_folder import socket_folder

SWITCH = "TERRACE_FORK_WORKERS"  # 0: every worker starts as a new Python; 1: forks, beside GPUs too
GPUS = ("/dev/nvidiactl", "/dev/kfd")  # what drivers of NVIDIA and AMD put there
NO_JOB = {"RAY_JOB_ID": "ffffffff"}  # of the workers that Ray starts before there is a job: they take any
OWN = frozenset({*NO_JOB, "PWD", "OLDPWD", "SHLVL", "_"})  # variables that each worker has for itself: the others are what shells note
READ_WHEN_LOADED = ("PYTHON", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_")  # variables that libraries read once
RAY = ("ray.train.torch", "ray.data")  # what all workers import of Ray
ANSWER_SECONDS = 10.0  # that a client has to say what it wants


# ---------------------------------------------------------------- beside it


def python_of_workers(modules: Sequence[str]) -> str | None:
    """A program that takes Python's place for the workers of one Ray, with a server behind it that imports `modules`, until the next one
    or this process's end. None where workers are not forked."""
    for server in _SERVERS:  # of a Ray that is no more: it ends with its last worker
        if server.stdin:
            server.stdin.close()
    if sys.platform != "linux" or not wanted_here():
        return None
    folder = socket_folder("terrace-fork-")
    address, python = folder / "server", folder / "python"
    words = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fork_client.py")), str(address), sys.executable]
    python.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    python.chmod(0o700)
    if not os.access(python, os.X_OK):  # a place from which nothing may be run
        shutil.rmtree(folder)
        return None
    # Its standard input is how it hears that this process has gone.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(128)
        command = [sys.executable, "-P", "-m", __name__, str(listener.fileno()), str(folder), *modules]
        files = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        _SERVERS.append(subprocess.Popen(command, pass_fds=[listener.fileno()], start_new_session=True, **files))
    return str(python)


def wanted_here() -> bool:
    """Whether workers are to be forks: as the variable says, else where there is no GPU."""
    return os.environ.get(SWITCH, "0" if any(map(os.path.exists, GPUS)) else "1") != "0"


_SERVERS: list[subprocess.Popen[bytes]] = []  # held, so that their standard inputs stay open


@contextlib.contextmanager
def called_python(program: str | None) -> Iterator[None]:
    """A block in which a Ray that is started takes `program` for this Python."""
    before = sys.executable
    sys.executable = program or before
    try:
        yield
    finally:
        sys.executable = before


# ---------------------------------------------------------------- the server


@dataclass(frozen=True)
class Wanted:
    """A worker process as Ray wanted it."""

    words: list[str]
    folder: str
    environment: dict[str, str]
    nice: int
    oom: str
    files: list[int]  # standard input, output and error


@dataclass
class _Forking:
    listener: socket.socket
    prepare: Callable[[dict[str, str]], bool]  # for workers of an environment: whether they can be forked
    environment: dict[str, str] | None = None  # of the workers that are forked
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    clients: dict[socket.socket, int] = field(default_factory=dict)  # and the process that each asked for
    ended: tuple[int, int] = field(default_factory=os.pipe)

    def serve(self) -> Wanted | None:
        """Fork a worker for each client that comes. Returns in each fork what it is to become; in the server None, when the process that
        started it has gone and so has the last worker."""
        for end in self.ended:
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # heard, so that the pipe is written to
        signal.set_wakeup_fd(self.ended[1], warn_on_full_buffer=False)
        starter = 0
        for file in (self.listener, starter, self.ended[0]):
            self.selector.register(file, selectors.EVENT_READ)
        open_to_more = True
        while open_to_more or self.clients:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    if (wanted := self._accept()) is not None:
                        return wanted
                elif key.fileobj == starter:
                    open_to_more = False
                    self.selector.unregister(starter)
                    self.selector.unregister(self.listener)
                    self.listener.close()
                elif key.fileobj == self.ended[0]:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.ended[0], 4096)
                    self._bury()
                elif key.fileobj in self.clients:  # it says nothing: it was killed, and means its worker
                    process = self.clients[key.fileobj]
                    self.selector.unregister(key.fileobj)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
        return None

    def _accept(self) -> Wanted | None:
        client, _ = self.listener.accept()
        try:
            client.settimeout(ANSWER_SECONDS)
            wanted = _received(client)
        except (OSError, ValueError, TypeError):
            client.close()  # and its process becomes the worker itself
            return None
        process = 0
        if self.environment is None and self.prepare(wanted.environment):
            self.environment = wanted.environment
        if self.environment is not None and common(wanted.environment) == common(self.environment):
            process = os.fork()
            if not process:
                self._leave(client)
                return wanted
            self.clients[client] = process
            self.selector.register(client, selectors.EVENT_READ)
        for file in wanted.files:
            os.close(file)
        with contextlib.suppress(OSError):
            client.sendall(process.to_bytes(8, "little"))
        if not process:
            client.close()
        return None

    def _bury(self) -> None:
        """Tell the clients of workers that have ended how."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                for client, process in list(self.clients.items()):
                    if process == found[0]:
                        code = os.waitstatus_to_exitcode(found[1])
                        with contextlib.suppress(OSError):
                            client.sendall((code if code >= 0 else 128 - code).to_bytes(8, "little"))
                        with contextlib.suppress(KeyError):
                            self.selector.unregister(client)
                        del self.clients[client]
                        client.close()

    def _leave(self, client: socket.socket) -> None:
        """In a fork: nothing of the server stays open."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for one in (self.listener, client, *self.clients):
            one.close()
        for end in self.ended:
            os.close(end)


def common(environment: dict[str, str]) -> dict[str, str]:
    """The variables in which workers may not differ."""
    return {name: value for name, value in environment.items() if name not in OWN}


def fixed(environment: dict[str, str]) -> dict[str, str]:
    """The variables that were read when modules were loaded, and that a fork cannot have otherwise."""
    return {name: value for name, value in environment.items() if name.startswith(READ_WHEN_LOADED)}


def _received(client: socket.socket) -> Wanted:
    head, files, _, _ = socket.recv_fds(client, 8, 3)
    length = int.from_bytes(head, "little")
    content = bytearray()
    while len(content) < length:
        piece = client.recv(length - len(content))
        if not piece:
            raise ValueError("the client went away")
        content += piece
    return Wanted(**json.loads(content.decode("utf-8", "surrogateescape")), files=list(files))


def become(wanted: Wanted) -> None:
    """In a fork: the process that Ray wanted, which runs its script."""
    take_variables(wanted.environment)
    os.chdir(wanted.folder)
    for number, file in enumerate(wanted.files):
        os.dup2(file, number)
        os.close(file)
    os.setpgid(0, 0)  # Ray ends a worker's whole group with it
    os.nice(wanted.nice - os.nice(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(wanted.oom)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # Python's own generator does so by itself
    script, *_ = sys.argv = wanted.words
    sys.path.insert(0, os.path.dirname(script))
    gc.unfreeze()
    runpy.run_path(script, run_name="__main__")


def touches_gpu() -> bool:
    """Whether this process has opened a GPU: its forks could not."""
    files = (Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    return any(_target(file).startswith("/dev/nvidia") for file in files)


def _target(file: Path) -> str:
    try:
        return os.readlink(file)
    except OSError:
        return ""


def import_all(modules: Iterable[str]) -> None:
    """Import them; what cannot be imported its users import themselves, and say so."""
    for name in modules:
        with contextlib.suppress(Exception):  # whatever a package raises where it does not fit this machine
            importlib.import_module(name)


def import_ray() -> None:
    """Ray and what workers import of it, its generator of ids untouched: modules that declare actors would draw from it, and all forks
    would go on from there alike."""
    import ray.actor

    ids = ray.actor.ActorClassID

    class FromTheSystem:
        from_random = staticmethod(lambda: ids(os.urandom(ids.size())))

    ray.actor.ActorClassID = FromTheSystem  # type: ignore[misc,assignment]
    try:
        import_all(RAY)
    finally:
        ray.actor.ActorClassID = ids  # type: ignore[misc]
    limit_torch()


def limit_torch() -> None:
    """Where Ray tells a worker how many threads it may take, by a variable that torch read when it was imported, torch is told as well."""
    import ray._private.utils
    import torch

    told = ray._private.utils.set_omp_num_threads_if_unset

    def set_both() -> bool:
        if changed := told():
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return changed

    ray._private.utils.set_omp_num_threads_if_unset = set_both


def forks_draw_apart() -> bool:
    """Whether two forks of this process would give what they make different ids."""
    import ray

    drawn = []
    for _ in range(2):
        read, write = os.pipe()
        if not (process := os.fork()):
            os.write(write, ray.ObjectID.from_random().binary())
            os._exit(0)
        os.waitpid(process, 0)
        drawn.append(os.read(read, 64))
        os.close(read)
        os.close(write)
    return drawn[0] != drawn[1]


def take_variables(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def main(words: list[str]) -> None:
    number, folder, *modules = words
    environment = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

    def prepare(wanted: dict[str, str]) -> bool:
        if "ray" in sys.modules or fixed(wanted) != fixed(environment):
            return False
        take_variables(wanted | NO_JOB)
        import_ray()
        gc.collect()
        gc.freeze()  # pages that are collected over would not stay shared
        return not touches_gpu() and forks_draw_apart()

    with socket.socket(fileno=int(number)) as listener:
        listener.set_inheritable(False)
        import_all(modules)
        wanted = _Forking(listener, prepare).serve()
    if wanted is not None:
        become(wanted)
    else:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
