"""Workers that are forked: each is the process that Ray wanted, ends as it ends, and whoever cannot be forked starts as ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from terrace.cluster import fork_client, fork_server
from terrace.cluster.fork_server import called_python, fixed, python_of_workers

SAYS = """
import json, os, signal, sys
if "wait" in sys.argv:
    open(sys.argv[2], "w").write(str(os.getpid()))
    signal.pause()
import random, numpy
print(json.dumps({
    "forked": "terrace.recipe.schema" in sys.modules, "words": sys.argv, "folder": os.getcwd(), "told": os.environ.get("TOLD"),
    "name": __name__, "path": sys.path[0], "group": os.getpgid(0) == os.getpid(), "read": sys.stdin.read(),
    "random": [random.random(), float(numpy.random.rand())], "nice": os.nice(0), "python": sys.executable,
}))
sys.exit(int(sys.argv[1]))
"""
# The server without Ray, whose import takes seconds.
SERVER = """
import os, sys
from terrace.cluster import fork_server
fork_server.import_ray, fork_server.forks_draw_apart = (lambda: None), (lambda: True)
fork_server.touches_gpu = lambda: os.environ.get("TOLD") == "gpu"
fork_server.main(sys.argv[1:])
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch):
    """(program in Python's place, Ray's worker script)."""
    script = tmp_path / "default_worker.py"
    script.write_text(SAYS)
    start = subprocess.Popen
    servers = []

    def popen(command, **options):
        servers.append(start([command[0], "-c", SERVER, *command[4:]], **options))
        return servers[-1]

    monkeypatch.setattr(fork_server.subprocess, "Popen", popen)
    monkeypatch.setenv("TOLD", "all")
    monkeypatch.setattr(fork_server, "GPUS", ())
    made = python_of_workers(["numpy.random", "terrace.recipe.schema", "no.such.module"])
    monkeypatch.undo()
    yield made, script, servers[0]
    servers[0].stdin.close()
    assert servers[0].wait(20) == 0
    assert not Path(made).parent.exists()


def run(made, *words, told="all", **options):
    environment = {**os.environ, "TOLD": told}
    return subprocess.run([made, *map(str, words)], env=environment, capture_output=True, text=True, timeout=60, **options)


def said(found) -> dict:
    return json.loads(found.stdout)


def test_a_fork_is_the_process_that_was_wanted(program, tmp_path: Path):
    made, script, _ = program
    first = run(made, script, 3, "ü", input="words", cwd=tmp_path)
    assert first.returncode == 3, first.stderr
    assert said(first) == said(first) | {
        "forked": True, "words": [str(script), "3", "ü"], "folder": str(tmp_path), "told": "all", "name": "__main__", "path": str(tmp_path),
        "group": True, "read": "words", "nice": os.nice(0), "python": sys.executable,
    }  # fmt: skip
    second = run(made, script, 0)
    assert (second.returncode, said(second)["forked"]) == (0, True)
    for one, other in zip(said(first)["random"], said(second)["random"]):
        assert one != other
    environment = {"command_prefix": [], "env_vars": {"TOLD": "all"}, "py_executable": sys.executable, "override_worker_entrypoint": None}
    setup = [tmp_path / "setup_worker.py", script, 5, f"--serialized-runtime-env-context={json.dumps(environment)}", "--language=PYTHON"]
    third = run(made, *setup, told="all")
    assert (third.returncode, said(third)["forked"], said(third)["words"]) == (5, True, [str(script), "5"])


def test_who_ends_whom(program, tmp_path: Path):
    made, script, server = program
    pids = []
    for number, ended in enumerate(("client", "worker", "starter")):
        note = tmp_path / f"note-{number}"
        client = subprocess.Popen([made, script, "wait", note], env={**os.environ, "TOLD": "all"})
        while not (note.exists() and note.read_text()):
            time.sleep(0.01)
        pids.append(int(note.read_text()))
        if ended == "client":
            client.kill()
        elif ended == "worker":
            os.kill(pids[-1], signal.SIGKILL)
        else:  # the server goes on for the worker that it has
            server.stdin.close()
            time.sleep(0.2)
            assert server.poll() is None
            os.kill(pids[-1], signal.SIGTERM)
        assert client.wait(20) == {"client": -9, "worker": 128 + 9, "starter": 128 + 15}[ended]
    for pid in pids:
        for _ in range(500):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.01)
        assert not Path(f"/proc/{pid}").exists()


def test_what_cannot_be_forked_starts_as_ever(program, tmp_path: Path):
    made, script, server = program
    assert said(run(made, script, 0))["forked"]
    other = run(made, script, 4, told="another environment")
    assert (other.returncode, said(other)["forked"], said(other)["told"]) == (4, False, "another environment")
    assert run(made, "-c", "print(7)").stdout == "7\n"
    server.kill()
    server.wait()
    alone = run(made, script, 2)
    assert (alone.returncode, said(alone)["forked"]) == (2, False)
    server.returncode = 0
    __import__("shutil").rmtree(Path(made).parent)


def test_a_server_that_has_opened_a_gpu_forks_nothing(program):
    made, script, _ = program
    assert said(run(made, script, 0, told="gpu"))["forked"] is False
    assert fork_server.touches_gpu() is False


@pytest.mark.parametrize(("environment", "words", "forked"), [
    ({"env_vars": {"A": "b"}}, ["--language=PYTHON"], True), ({"env_vars": {"A": "${B}"}}, ["--language=PYTHON"], False),
    ({"command_prefix": ["cd x &&"]}, ["--language=PYTHON"], False), ({"py_executable": "/other"}, ["--language=PYTHON"], False),
    ({"override_worker_entrypoint": "x"}, ["--language=PYTHON"], False), ({"something": "new"}, ["--language=PYTHON"], False),
    ({}, [], False),
])  # fmt: skip
def test_environments_that_are_more_than_variables_are_set_up_by_ray(environment, words, forked):
    told = ["/ray/setup_worker.py", "/ray/default_worker.py", "--a=b", fork_client.ENVIRONMENT + json.dumps(environment), *words]
    found = (["/ray/default_worker.py", "--a=b"], environment.get("env_vars", {})) if forked else ([], {})
    assert fork_client.as_worker(told, "/python") == found
    assert fork_client.as_worker(["/ray/agent.py"], "/python") == fork_client.as_worker([], "/python") == ([], {})


def test_python_is_called_otherwise_while_ray_starts_alone(monkeypatch):
    before = sys.executable
    with called_python("/another"):
        assert sys.executable == "/another"
    assert sys.executable == before
    with called_python(None):
        assert sys.executable == before
    monkeypatch.setenv(fork_server.SWITCH, "0")
    assert python_of_workers(["json"]) is None
    assert sys.executable == before
    assert fixed({"OMP_NUM_THREADS": "2", "HOME": "x", "PYTHONPATH": "y"}) == {"OMP_NUM_THREADS": "2", "PYTHONPATH": "y"}


def test_beside_a_gpu_workers_are_forks_only_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv(fork_server.SWITCH, raising=False)
    monkeypatch.setattr(fork_server, "GPUS", (str(tmp_path / "nvidiactl"),))
    assert fork_server.wanted_here()
    (tmp_path / "nvidiactl").touch()
    assert not fork_server.wanted_here()
    monkeypatch.setenv(fork_server.SWITCH, "1")
    assert fork_server.wanted_here()
