"""The process that keeps a run's folder and the storage in step: faults, takeovers, what it asks, and what a controller makes of them."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from curriculum_launcher import CountingLauncher
from fakes import tiny_recipe
from stored_run import Machines
from waiting import eventually

from terrace import cli
from terrace.curriculum import run as run_module
from terrace.curriculum.journal import read_journal
from terrace.errors import InputError
from terrace.storage import conditional, follower, mirror
from terrace.storage.conditional import read_versioned, write_if
from terrace.track.progress import Display


@pytest.mark.parametrize("answer", [(403, "AccessDenied"), (400, "ExpiredToken"), (404, "NoSuchBucket"), (503, "SlowDown"), (418, "Odd")])
@pytest.mark.usefixtures("hurried")
def test_the_follower_outlives_every_fault_and_catches_up(machines: Machines, run: str, answer, caplog: pytest.LogCaptureFixture):
    with machines.on("a"):
        here = mirror.open_run(run)
        with mirror.following(here):
            (here / "metrics.jsonl").write_text("1\n")
            assert eventually(lambda: read_versioned(f"{run}/metrics.jsonl") is not None)
            machines.server.fault = lambda number, method: answer
            (here / "metrics.jsonl").write_text("1\n2\n")
            assert eventually(lambda: sum("not reached" in record.message for record in caplog.records) >= 2)
            machines.server.fault = None
            assert eventually(lambda: read_versioned(f"{run}/metrics.jsonl")[0] == b"1\n2\n")
            write_if(f"{run}/requests/1.json", b"{}", None)
            assert eventually(lambda: (here / "requests/1.json").exists()), "it still hears of others"


@pytest.mark.usefixtures("hurried")
def test_another_process_takes_over_from_a_follower_that_ends_or_hangs(machines: Machines, run: str):
    with machines.on("a"):
        here = mirror.open_run(run)
        with contextlib.ExitStack() as both:
            other = both.enter_context(open(here / follower.FOLLOWER, "a"))
            fcntl.flock(other, fcntl.LOCK_EX)
            os.utime(here / follower.FOLLOWER)
            both.enter_context(mirror.following(here))
            (here / "metrics.jsonl").write_text("1\n")
            time.sleep(0.5)
            assert read_versioned(f"{run}/metrics.jsonl") is None
            os.utime(here / follower.FOLLOWER, (time.time() - 100, time.time() - 100))  # it hangs
            assert eventually(lambda: read_versioned(f"{run}/metrics.jsonl") is not None)
            os.utime(here / follower.FOLLOWER)
            (here / "metrics.jsonl").write_text("1\n2\n")
            fcntl.flock(other, fcntl.LOCK_UN)  # it ended
            assert eventually(lambda: read_versioned(f"{run}/metrics.jsonl")[0] == b"1\n2\n")


@pytest.mark.usefixtures("hurried")
def test_a_storage_that_stays_away_stops_the_run_by_name(machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(follower, "LOST_SECONDS", 0.5)
    told = []
    with machines.on("a"):
        here = mirror.open_run(run)
        with mirror.following(here, lost=told.append) as follows:
            (here / "metrics.jsonl").write_text("1\n")
            machines.server.fault = lambda number, method: (403, "AccessDenied")
            assert eventually(lambda: bool(told))
            assert run in str(told[0])
            assert "access denied" in str(told[0])
            assert "the same command continues" in str(told[0])
            machines.server.fault = None
            assert eventually(lambda: read_versioned(f"{run}/metrics.jsonl") is not None), "it goes on trying"
        assert follows.lost is told[0]
    assert len(told) == 1


@pytest.mark.usefixtures("hurried")
def test_a_controller_whose_storage_stays_away_ends_by_name(
    machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(follower, "LOST_SECONDS", 0.3)
    monkeypatch.setattr(run_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(run_module.Watch, "start", lambda self: None)
    launcher = CountingLauncher(tiny_recipe(1), steps=10**9)

    def refuse_for_a_while() -> None:
        assert eventually(lambda: bool(launcher.launched))
        time.sleep(1)  # events of the start are written; the stage trains
        machines.server.fault = lambda number, method: (400, "ExpiredToken")
        assert eventually(lambda: "so the run was stopped" in caplog.text)
        machines.server.fault = None

    chaos = threading.Thread(target=refuse_for_a_while)
    with machines.on("a"):
        chaos.start()
        here = mirror.open_run(run)
        outcome = run_module.run_curriculum(launcher.recipe, here, launcher, Display(io.StringIO()), prepare=lambda *_: {})
        chaos.join()
    assert (outcome.phase, outcome.exit_status) == ("interrupted", 1)
    assert re.search(rf"^{re.escape(run)}: nothing could be stored or read for .*access denied.*same command continues", outcome.message)
    with machines.on("b"):
        assert read_journal(mirror.open_run(run)).events[-1]["event"] in ("stage_attempt_preempted", "stage_attempt_interrupted")


def test_a_follower_asks_less_while_nothing_changes_and_one_process_of_a_machine_asks(
    machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(follower, "SYNC_SECONDS", 0.1)
    monkeypatch.setattr(follower, "IDLE_SECONDS", 0.5)
    with machines.on("a"):
        here = mirror.open_run(run)
        with contextlib.ExitStack() as workers:
            for _ in range(4):
                workers.enter_context(mirror.following(here))
            time.sleep(2)
            machines.server.requests.clear()
            time.sleep(3)
            assert len(machines.server.requests) <= 3 * (3 / 0.4 + 1), "three listings each 0.5 s, of one follower"
            workers.pop_all().close()


@pytest.mark.parametrize(
    ("ignored", "named"), [((), ""), (("If-Match",), "If-Match"), (("If-Match", "If-None-Match"), "If-None-Match and If-Match")]
)
def test_a_storage_that_ignores_conditions_is_refused_or_accepted_by_name(
    machines: Machines, run: str, ignored, named: str, monkeypatch: pytest.MonkeyPatch
):
    with machines.on("a"):
        here = mirror.open_run(run)
    machines.server.ignored = ignored
    if named:
        with pytest.raises(InputError, match=f"{re.escape(run)}: this storage ignores {named}, .*{mirror.ACCEPT}=accept"):
            mirror.require_conditions(here)
        monkeypatch.setenv(mirror.ACCEPT, "accept")
    mirror.require_conditions(here)
    assert conditional.list_objects(run) == [], "the probe leaves nothing"


def test_a_run_is_not_named_with_credentials(capsys: pytest.CaptureFixture):
    assert cli.main(["status", "s3://KEY:hunter2@bucket/x"]) == 2
    line = capsys.readouterr().err
    assert "AWS_PROFILE" in line
    assert "hunter2" not in line


@pytest.mark.usefixtures("hurried")
def test_messages_name_the_run_as_the_user_does(machines: Machines, run: str, capsys: pytest.CaptureFixture):
    with machines.on("a"):
        for place, words in (("s3://nobucket1/x", "there is no bucket 'nobucket1'"), (run, f"{run} is no run directory")):
            assert cli.main(["status", place]) == 2
            line = capsys.readouterr().err
            assert line.startswith(f"terrace: {place}")
            assert words in line
            assert str(machines.folder) not in line
