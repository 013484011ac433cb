"""Runs on S3: conditional writes, the folder that follows the storage, lease and journal, from machines that share nothing else."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from curriculum_launcher import CountingLauncher
from fakes import tiny_recipe
from stored_run import Machines

from terrace import cli
from terrace.cluster.attempt_files import Fenced, claim_attempt, stop_requested
from terrace.curriculum import run as run_module
from terrace.curriculum.journal import (
    Journal,
    LeaseHeld,
    LeaseLost,
    acquire_lease,
    lease_holder,
    leave_request,
    pending_requests,
    read_journal,
    renew_lease,
)
from terrace.curriculum.run import move_aside
from terrace.errors import InputError
from terrace.storage import conditional, follower, mirror, synchronise
from terrace.storage import s3 as storage_module
from terrace.storage.conditional import Changed, read_versioned, write_if
from terrace.storage.faults import StorageError
from terrace.track.progress import Display

# ---------------------------------------------------------------- conditional writes


def test_a_write_replaces_only_the_version_it_names(machines: Machines, run: str):
    with pytest.raises(Changed):
        write_if(f"{run}/x", b"1", "0123")  # there is none yet
    first = write_if(f"{run}/x", b"1", None)
    second = write_if(f"{run}/x", b"2", first)
    for stale in (None, first):
        with pytest.raises(Changed):
            write_if(f"{run}/x", b"3", stale)
    assert read_versioned(f"{run}/x") == (b"2", second)


def test_a_write_whose_answer_was_lost_counts_as_written(machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage_module, "BACKOFF_BASE_SECONDS", 0.01)
    filesystem = storage_module.s3()
    real, lost = filesystem.call_s3, []

    def forgetful(method: str, **arguments):
        answer = real(method, **arguments)
        if method == "put_object" and not lost:
            lost.append(method)
            raise ConnectionResetError("the answer was lost")
        return answer

    monkeypatch.setattr(filesystem, "call_s3", forgetful)
    version = write_if(f"{run}/x", b"mine", None)
    assert lost
    assert read_versioned(f"{run}/x") == (b"mine", version)


def test_of_many_writers_each_change_is_kept(machines: Machines, run: str):
    def add(number: int) -> None:
        conditional.swap(f"{run}/list", lambda content: json.dumps([*json.loads(content or b"[]"), number]).encode())

    threads = [threading.Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.loads(read_versioned(f"{run}/list")[0])) == list(range(6))


# ---------------------------------------------------------------- the folder


def test_small_files_go_both_ways_and_others_stay(machines: Machines, run: str):
    with machines.on("a"):
        here = mirror.open_run(run)
        stage = here / "stages" / "01-warm"
        for name in ("metrics.jsonl", "attempts/001/rank-0000.json", "checkpoints/step-000002/state.json", "final/config.json"):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_text("{}\n")
        (here / "recipe.yaml").write_text("name: x\n")
        mirror.flush(stage)
    assert {entry.name for entry in conditional.list_objects(run)} == {
        "recipe.yaml", "stages/01-warm/metrics.jsonl", "stages/01-warm/attempts/001/rank-0000.json",
    }  # fmt: skip
    with machines.on("b"):
        there = mirror.open_run(run)
        assert there != here
        follower = open(there / "stages/01-warm/metrics.jsonl")  # noqa: SIM115
        assert follower.read() == "{}\n"
    with open(stage / "metrics.jsonl", "a") as file:
        file.write('{"step": 1}\n')
    mirror.flush(here)
    mirror.synchronise(there)
    assert follower.read() == '{"step": 1}\n', "an open reader sees the file grow"


def test_a_file_too_large_to_keep_in_step_stays_where_it_is(machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(synchronise, "LARGEST_BYTES", 100)
    with machines.on("a"):
        here = mirror.open_run(run)
        (here / "stages/01-warm/profile").mkdir(parents=True)
        (here / "stages/01-warm/profile/trace.json").write_text("x" * 101)
        mirror.synchronise(here)
        mirror.open_run(run)
    assert (here / "stages/01-warm/profile/trace.json").exists()
    assert conditional.list_objects(run) == []


def test_what_a_killed_process_had_not_stored_did_not_happen(machines: Machines, run: str):
    with machines.on("a"):
        here = mirror.open_run(run)
        (here / "stages/01-warm").mkdir(parents=True)
        (here / "stages/01-warm/metrics.jsonl").write_text("1\n")
        mirror.flush(here)
        (here / "stages/01-warm/metrics.jsonl").write_text("1\n2\n")
        (here / "stages/01-warm/result.json").write_text("{}")
        with mirror.following(here):
            mirror.open_run(run)  # another process of this machine looks at it: nothing is lost
            assert (here / "stages/01-warm/result.json").exists()
            conditional.remove([f"{run}/stages/01-warm/result.json"])
            (here / synchronise.STATE).write_text("{}")  # killed before it could note what it stored
            mirror.open_run(run)
            assert (here / "stages/01-warm/metrics.jsonl").read_text() == "1\n2\n", "a longer file of ours goes up again"
        (here / "stages/01-warm/metrics.jsonl").write_text("1\n2\n3\n")
        (here / "stages/01-warm/plan.json").write_text("{}")
        mirror.open_run(run)
    assert (here / "stages/01-warm/metrics.jsonl").read_text() == "1\n2\n"
    assert not (here / "stages/01-warm/plan.json").exists()


def test_a_cleaner_of_temporary_files_deletes_nothing_on_the_storage(machines: Machines, run: str):
    with machines.on("a"):
        here = mirror.open_run(run)
        (here / "stages/01-warm/attempts/001").mkdir(parents=True)
        (here / "stages/01-warm/result.json").write_text("{}")
        (here / "stages/01-warm/attempts/001/alive-0000.json").write_text("{}")
        mirror.flush(here)
        (here / "stages/01-warm/result.json").unlink()
        (here / "stages/01-warm/attempts/001/alive-0000.json").unlink()
        mirror.synchronise(here)
        mirror.synchronise(here)
    assert (here / "stages/01-warm/result.json").exists()
    assert [entry.name for entry in conditional.list_objects(run)] == ["stages/01-warm/result.json"], "only the sign of life is gone"


def test_an_older_attempt_on_another_machine_is_told_and_cannot_overwrite(machines: Machines, run: str):
    stage = "stages/01-warm"
    with machines.on("a"):
        old = mirror.open_run(run)
        claim_attempt(old / stage, 1)
        (old / stage / "metrics.jsonl").write_text("old 1\n")
        mirror.flush(old)
    with machines.on("b"):
        new = mirror.open_run(run)
        claim_attempt(new / stage, 2)
        (new / stage / "metrics.jsonl").write_text("new 1\n")
        mirror.flush(new)
    (old / stage / "metrics.jsonl").write_text("old 1\nold 2\n")  # it wakes up
    mirror.flush(old)
    assert read_versioned(f"{run}/{stage}/metrics.jsonl")[0] == b"new 1\n"
    mirror.synchronise(old)
    with pytest.raises(Fenced, match="attempt 2"):
        stop_requested(old / stage, 1)


def test_a_heartbeat_of_another_machine_stays_young(machines: Machines, run: str):
    name = "stages/01-warm/attempts/001/alive-0000.json"
    with machines.on("a"):
        here = mirror.open_run(run)
        (here / name).parent.mkdir(parents=True)
        (here / name).write_text("{}")
        mirror.flush(here)
    with machines.on("b"):
        there = mirror.open_run(run)
        first = (there / name).stat().st_mtime
        assert abs(first - time.time()) < 3
        time.sleep(2.1)
        (here / name).touch()
        mirror.flush(here)
        mirror.synchronise(there)
        assert (there / name).stat().st_mtime > first


def test_folders_arrive_complete_or_not_at_all(machines: Machines, run: str):
    with machines.on("a"):
        here = mirror.open_run(run) / "stages/01-warm/final"
        (here / "deep").mkdir(parents=True)
        (here / "config.json").write_text("1")
        (here / "deep/model.safetensors").write_bytes(b"x" * 1000)
        mirror.store_folder(here, mirror.FINAL_LAST)
    with machines.on("b"):
        there = mirror.open_run(run) / "stages/01-warm/final"
        assert mirror.fetch_folder(there, mirror.FINAL_LAST)
        assert (there / "deep/model.safetensors").read_bytes() == b"x" * 1000
        (here / "config.json").write_text("2")
        mirror.store_folder(here, mirror.FINAL_LAST)
        assert mirror.fetch_folder(there, mirror.FINAL_LAST)
        assert (there / "config.json").read_text() == "2", "another version is fetched anew"
        assert not mirror.fetch_folder(there.with_name("other"), mirror.FINAL_LAST)
        assert not there.with_name("other").exists()


def test_a_rerun_moves_what_was_stored_aside_once(machines: Machines, run: str):
    with machines.on("a"):
        stage = mirror.open_run(run) / "stages/01-warm"
        (stage / "final").mkdir(parents=True)
        (stage / "final/config.json").write_text("1")
        (stage / "result.json").write_text("1")
        mirror.store_folder(stage / "final", mirror.FINAL_LAST)
        mirror.flush(stage)
        move_aside(stage, 1)
        mirror.refresh(stage)
        names = {entry.name for entry in conditional.list_objects(f"{run}/stages")}
        assert names == {"01-warm.rerun-1/final/config.json", "01-warm.rerun-1/result.json", "01-warm.rerun-1/.moved"}
        stage.mkdir(exist_ok=True)
        (stage / "result.json").write_text("2")
        mirror.flush(stage)
        move_aside(stage, 1)
        assert read_versioned(f"{run}/stages/01-warm/result.json")[0] == b"2", "what the rerun wrote stays"


def test_a_file_that_is_new_here_does_not_replace_what_another_machine_wrote(machines: Machines, run: str):
    with machines.on("a"):
        here = mirror.open_run(run)
    with machines.on("b"):
        there = mirror.open_run(run)
    for root, content in ((here, "a"), (there, "b")):  # neither has seen the other's
        (root / "stages/01-warm").mkdir(parents=True)
        (root / "stages/01-warm/result.json").write_text(content)
        mirror.flush(root)
    assert read_versioned(f"{run}/stages/01-warm/result.json")[0] == b"a"


# ---------------------------------------------------------------- the follower


@pytest.fixture(autouse=True)
def sound_server(machines: Machines) -> Iterator[None]:
    yield
    machines.server.fault, machines.server.ignored = None, ()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that turns 40 times faster."""
    storage_module._served.clear()
    for name in ("SYNC_SECONDS", "IDLE_SECONDS", "LARGEST_WAIT_SECONDS"):
        monkeypatch.setattr(follower, name, getattr(follower, name) / 40)
    monkeypatch.setattr(storage_module, "BACKOFF_BASE_SECONDS", 0.001)


def eventually(what, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.02)
    return what()


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


# ---------------------------------------------------------------- lease, journal, requests


def test_a_second_controller_on_another_machine_is_refused_until_the_lease_expires(machines: Machines, run: str):
    now = 1000.0
    with machines.on("a"):
        first = acquire_lease(mirror.open_run(run), 60, clock=lambda: now)
    with machines.on("b"):
        there = mirror.open_run(run)
        for later in (0, 59, 5000):  # how long this machine's clock says; 5000 is the first look after a renewal
            if later == 5000:
                with machines.on("a"):
                    renew_lease(first, clock=lambda: now + 59)
            with pytest.raises(LeaseHeld, match="on a since"):
                acquire_lease(there, 60, clock=lambda: now + later)  # noqa: B023
        assert acquire_lease(there, 60, clock=lambda: now + 5061).token == first.token + 1
        with machines.on("a"), pytest.raises(LeaseLost, match=re.escape(f"{run} was taken over by process")):
            renew_lease(first)


def test_of_controllers_that_come_at_once_one_is_let_in(machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch):
    with machines.on("a"):
        here = mirror.open_run(run)
        real, late = conditional.read_versioned, []

        def read_and_be_overtaken(uri: str, *rest):
            found = real(uri, *rest)
            if not late:
                late.append(acquire_lease)
                write_if(uri, json.dumps({"token": 1, "host": "b", "pid": 7, "acquired": 0.0, "expires": 1e12}).encode(), None)
            return found

        monkeypatch.setattr(conditional, "read_versioned", read_and_be_overtaken)
        with pytest.raises(LeaseHeld, match="process 7 on b"):
            acquire_lease(here)


def test_the_journal_is_on_the_storage_and_an_overtaken_controller_adds_nothing(machines: Machines, run: str):
    with machines.on("a"):
        old = Journal(mirror.open_run(run), lease_seconds=0.2)
        old._stop_renewing.set()  # it hangs: its lease is not renewed
        old.__enter__()
        old.append({"event": "run_started"})
        old.append({"event": "data_prepared"})
    with machines.on("b"):
        there = mirror.open_run(run)
        assert lease_holder(there)["host"] == "a"
        time.sleep(0.3)
        with Journal(there) as young:
            assert [event["event"] for event in young.events] == ["run_started", "data_prepared"]
            with machines.on("a"), pytest.raises(LeaseLost):
                old.append({"event": "run_failed"})
            young.append({"event": "controller_started"})
            # Even one that believes in its lease cannot: the journal is another version by now.
            old.lease = young.lease
            with machines.on("a"), pytest.raises(LeaseLost, match="events of another controller"):
                old.append({"event": "run_failed"})
        assert [event["event"] for event in read_journal(mirror.open_run(run)).events] == [
            "run_started", "data_prepared", "controller_started",
        ]  # fmt: skip


@pytest.mark.usefixtures("hurried")
def test_an_event_waits_for_the_storage(machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def refuse_until(words: str) -> threading.Thread:
        machines.server.fault = lambda number, method: (403, "AccessDenied")

        def mend() -> None:
            assert eventually(lambda: words in caplog.text)
            machines.server.fault = None

        thread = threading.Thread(target=mend)
        thread.start()
        return thread

    with machines.on("a"), Journal(mirror.open_run(run)) as journal:
        journal.append({"event": "run_started"})
        waiting = refuse_until("the run waits for its storage")
        journal.append({"event": "data_prepared"})
        waiting.join()
        monkeypatch.setattr(follower, "LOST_SECONDS", 0.0)
        machines.server.fault = lambda number, method: (403, "AccessDenied")
        with pytest.raises(StorageError, match="still failing after 10 tries"):
            journal.append({"event": "paused"})
        machines.server.fault = None
    with machines.on("b"):
        events = [event["event"] for event in read_journal(mirror.open_run(run)).events]
    assert events == ["run_started", "data_prepared"]


def test_requests_reach_the_controller_on_another_machine_and_are_taken_once(machines: Machines, run: str):
    with machines.on("a"):
        here = mirror.open_run(run)
    with machines.on("b"):
        leave_request(mirror.open_run(run), {"event": "pause_requested"})
    mirror.synchronise(here)
    [(path, request)] = pending_requests(here)
    assert request["event"] == "pause_requested"
    path.unlink()
    mirror.synchronise(here)
    assert conditional.list_objects(f"{run}/requests") == []
