"""Errors reach the person who runs Terrace: one line, the sentence first, the right exit status, and no retry that cannot help."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import grpc
import pytest

from terrace import cli
from terrace.cluster import start_ray
from terrace.cluster.attempt_files import write_outcome
from terrace.cluster.attempt_outcome import outcome
from terrace.cluster.start_ray import require_answer, silence_daemons
from terrace.errors import DamagedData, InputError, Preempted, one_line
from terrace.models.build import model_config
from terrace.recipe.schema import Model

SENTENCE = "sample rows/7 in shard 3: its picture cannot be decoded; set on_damage: skip, or index the source again"


def test_a_damaged_sample_inside_rays_wrappers_is_the_sentence_alone():
    """Ray raises a class of its own that also is a DamagedData, and whose text is a coloured trace."""
    from ray.exceptions import RayTaskError

    from terrace.data.stream.ray_stream import _terrace_error

    cause = DamagedData(SENTENCE)
    wrapped = RayTaskError("ReadPacks", "\x1b[36mray::ReadPacks()\x1b[39m\nTraceback ...", cause).as_instanceof_cause()
    assert isinstance(wrapped, DamagedData)
    assert "\x1b[36m" in str(wrapped)
    found = _terrace_error(wrapped)
    assert found is cause
    outer = RuntimeError("the pipeline ended")
    outer.__cause__ = wrapped
    assert _terrace_error(outer) is cause


def test_what_a_retry_cannot_mend_is_not_retried(tmp_path):
    error = DamagedData(SENTENCE)
    assert error.exit_status == 2
    values = {"status": "failed", "error": "DamagedData", "message": SENTENCE, "exit_status": error.exit_status, "time": time.time()}
    write_outcome(tmp_path, 1, 0, {"rank": 0, **values})
    seen = outcome(tmp_path, "one", 1)
    assert seen.failure == "input"  # which the state machine does not try again
    assert seen.message == f"{SENTENCE} (rank 0)"
    assert json.dumps(seen.message).count("\\u001b") == 0


def test_a_worker_that_was_killed_is_a_sentence_and_rays_paragraph_is_not_printed(capfd):
    from ray._private import worker
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from terrace.cluster.local import _describe

    died = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
    failed = RuntimeError("the group failed")
    failed.worker_failures = {3: died}
    reason, message = _describe(failed)
    assert reason == "ActorDiedError"
    assert message == (
        "rank 3: its process was killed, ran out of memory or does not answer (The actor died unexpectedly before finishing this task)"
    )
    printed = worker.print_to_stdstream
    try:
        silence_daemons()
        worker.print_to_stdstream({"lines": ["A worker died or was killed ..."], "pid": "raylet", "is_err": True}, ignore_prefix=False)
    finally:
        worker.print_to_stdstream = printed
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        (SENTENCE, SENTENCE),
        ("3 prompts cannot be judged\n  rows/1: no number\n", "3 prompts cannot be judged: rows/1: no number"),
        ("2 problems:\n\n  a: wrong\n  b: wrong", "2 problems: a: wrong (`terrace logs RUN` shows the rest)"),
        ("\n", ""),
    ],
)
def test_a_journal_keeps_of_a_message_what_is_wrong_and_the_first_reason(message, kept):
    assert one_line(message) == kept


def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch):
    """Nothing listens; something that never answers; a web server, as Ray's dashboard is one; and what Ray's servers are, gRPC."""
    monkeypatch.setattr(start_ray, "ANSWER_SECONDS", 2.0)
    started = time.monotonic()
    grpc_server = grpc.server(ThreadPoolExecutor(1))
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    try:
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "local"):
            require_answer(address)
    finally:
        grpc_server.stop(0).wait()
    with socket.create_server(("127.0.0.1", 0)) as silent, HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        others = [f"127.0.0.1:{one}" for one in (silent.getsockname()[1], web.server_port)]
        for address in (f"127.0.0.1:{port}", f"ray://localhost:{port}", f"[::1]:{port}", "127.0.0.1:99999", *others):
            with pytest.raises(InputError, match=r"RAY_ADDRESS=.* no Ray cluster answers there"):
                require_answer(address)
        web.shutdown()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "/proc/nope"), 2, "terrace: /proc/nope: No such file or directory"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "terrace: /root/x: Permission denied"),
        (OSError(28, "No space left on device", "/data/x"), 1, "terrace: /data/x: No space left on device"),
        (OSError("something else"), 1, "terrace: OSError: something else"),
        (KeyboardInterrupt(), 130, "terrace: interrupted"),
        (DamagedData(SENTENCE), 2, f"terrace: {SENTENCE}"),
        (ZeroDivisionError("division by zero"), 1, "terrace: ZeroDivisionError: division by zero"),
    ],
)
def test_errors_end_as_one_line_and_a_status(error, status, line, monkeypatch, capsys):
    def fail(given):
        raise error

    monkeypatch.setattr(cli, "run_subcommand", fail)
    assert cli.main(["status", "x"]) == status
    assert capsys.readouterr().err.startswith(line)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    for directory, words in ((tmp_path / "none", "there is no such folder"), (tmp_path, r"no config\.json in it")):
        with pytest.raises(InputError, match=rf"model\.pretrained: .*{words}"):
            model_config(Model(architecture="qwen2_vl", pretrained=str(directory)))


def test_a_signal_while_ray_starts_is_a_stop_on_request():
    """Ray's own handler ends the process with status 15 and without a word."""
    from terrace.cluster.start_ray import _own_signal_handlers

    def starts() -> None:
        with _own_signal_handlers():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    def ends() -> None:
        with _own_signal_handlers():
            sys.exit(3)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="the same command continues") as raised:
        starts()
    assert raised.value.exit_status == 143
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(SystemExit):
        ends()


def test_places_that_cannot_be_written_are_named(tmp_path, monkeypatch, capsys):
    """A file where a run's folder goes, a home that is not there, a dead cluster before a demo's scenes are drawn."""
    tiny = str(Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.chdir(tmp_path)
    there = [f"data.sources.{name}.uri={tmp_path}/file" for name in ("captions", "documents", "text", "instructions", "grounding")]
    dead = {"RAY_ADDRESS": "127.0.0.1:1"}
    for arguments, variables, words in (
            (["run", tiny, "--run-dir", f"{tmp_path}/file", *there], {}, "/file cannot be made (it is a file)"),
        (["run", tiny, "--run-dir", "/proc/nowhere", *there], {}, "the run directory /proc/nowhere cannot be made"),
        (["order", tiny, "alignment"], {}, "cannot be made (No such file or directory); set XDG_CACHE_HOME"),
        (["run", "demo", "--run-dir", str(tmp_path / "run")], dead, "no Ray cluster answers there"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert cli.main(arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert words in err
        assert "drawing" not in out
        assert err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()
