"""Lease, journal and requests of a run on S3, from machines that share nothing else."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import s3fs

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stored_run import Machines
from waiting import eventually

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
from terrace.curriculum.lease import outlast_lease
from terrace.recipe.schema import Storage
from terrace.storage import conditional, follower, mirror
from terrace.storage.conditional import write_if
from terrace.storage.faults import StorageError


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


def test_a_machine_that_never_saw_the_lease_watches_it_and_goes_on_where_nobody_renews_it(machines: Machines, run: str):
    """As a pod that replaces a dead one: refused at once it would be gone before the lease, and its successor would begin anew."""
    now, told = [1000.0], list[str]()

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    def renewed(seconds: float) -> None:
        pass_time(seconds)
        with machines.on("a"):
            renew_lease(first, clock=lambda: 0.0)  # whatever that machine's clock says

    with machines.on("a"):
        first = acquire_lease(mirror.open_run(run), 60, clock=lambda: 5e6)
        outlast_lease(mirror.open_run(run), told.append, lambda: now[0], pass_time)  # this machine's own process: it is not watched
    with machines.on("b"):
        there = mirror.open_run(run)
        with pytest.raises(LeaseHeld, match=r"process \d+ on a since .* stops it\.$"):
            outlast_lease(there, told.append, lambda: now[0], renewed)
        began = now[0]
        outlast_lease(there, told.append, lambda: now[0], pass_time)
        assert now[0] - began == pytest.approx(60, abs=2)
        assert acquire_lease(there, 60, clock=lambda: now[0]).token == first.token + 1
    assert [re.search(r"watched for (\d+) s", line)[1] for line in told] == ["60", "60"]


def test_a_write_that_is_never_answered_is_given_up_and_made_again(machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch):
    real, asked = s3fs.S3FileSystem._call_s3, []

    async def unanswered_once(self, method, *rest, **what):
        asked.append(method)
        if len(asked) == 1:
            await asyncio.Event().wait()
        return await real(self, method, *rest, **what)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", unanswered_once)
    assert write_if(f"{run}/note.json", b"{}", None, Storage(timeout_seconds=0.1))
    assert conditional.read_versioned(f"{run}/note.json")[0] == b"{}"
    assert asked[:2] == ["put_object", "put_object"]


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
