"""The journal and its lease: what a crash leaves, and that there is one writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from terrace.curriculum.journal import (
    Journal,
    JournalError,
    LeaseHeld,
    LeaseLost,
    acquire_lease,
    lease_holder,
    leave_request,
    pending_requests,
    read_journal,
    release_lease,
    renew_lease,
)


def test_events_come_back_in_order_with_time_sequence_and_token(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.append({"event": "run_started"})
        journal.append({"event": "paused", "reason": "a\nline\u2028and more"})
    with Journal(tmp_path) as journal:
        journal.append({"event": "resume_requested"})
    events = read_journal(tmp_path).events
    assert [event["event"] for event in events] == ["run_started", "paused", "resume_requested"]
    assert [event["sequence"] for event in events] == [1, 2, 3]
    assert [event["token"] for event in events] == [1, 1, 2]
    assert events[1]["reason"] == "a\nline\u2028and more"


@pytest.mark.parametrize("torn", ['{"event": "pa', '{"event": "paused"}', "\x00\x00", '{"event": "paus\n'])
def test_a_torn_last_line_is_skipped_reported_and_cut(tmp_path: Path, torn: str):
    with Journal(tmp_path) as journal:
        journal.append({"event": "run_started"})
    path = tmp_path / "journal.jsonl"
    with open(path, "a") as file:
        file.write(torn)
    content = read_journal(tmp_path)
    assert [event["event"] for event in content.events] == ["run_started"]
    assert content.torn
    with Journal(tmp_path) as journal:
        assert journal.torn
        journal.append({"event": "data_prepared"})
    assert [event["event"] for event in read_journal(tmp_path).events] == ["run_started", "data_prepared"]


def test_a_broken_line_in_the_middle_is_an_error_with_its_line(tmp_path: Path):
    (tmp_path / "journal.jsonl").write_text('{"event": "run_started"}\nnot json\n{"event": "paused"}\n')
    with pytest.raises(JournalError, match="line 2"):
        read_journal(tmp_path)


def test_every_cut_of_the_file_is_readable(tmp_path: Path):
    with Journal(tmp_path) as journal:
        for number in range(4):
            journal.append({"event": "checkpoint_saved", "stage": "a", "step": number})
    content = (tmp_path / "journal.jsonl").read_bytes()
    for size in range(len(content)):
        (tmp_path / "journal.jsonl").write_bytes(content[:size])
        assert len(read_journal(tmp_path).events) == content[:size].count(b"\n")


def test_a_second_controller_is_refused_by_host_and_process(tmp_path: Path):
    with Journal(tmp_path):
        with pytest.raises(LeaseHeld, match=rf"process {os.getpid()} on "):
            acquire_lease(tmp_path)
        assert lease_holder(tmp_path)["pid"] == os.getpid()
    assert lease_holder(tmp_path) is None
    release_lease(acquire_lease(tmp_path))


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path: Path):
    code = """
import sys, time
from terrace.curriculum.journal import acquire_lease
acquire_lease(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=paths)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(LeaseHeld, match=str(holder.pid)):
        acquire_lease(tmp_path)
    holder.kill()
    holder.wait()
    assert acquire_lease(tmp_path).token == 2


@pytest.mark.parametrize("skew", [-3600.0, 0.0, 61.0, 1e6])
def test_a_lease_of_another_host_holds_while_it_is_renewed_whatever_the_clocks_say(tmp_path: Path, skew: float):
    """`skew`: how far the clock of this machine is ahead of the holder's."""
    lease = acquire_lease(tmp_path, 60, clock=lambda: 1000.0)

    def renewed_at(time_there: float) -> None:
        held = json.loads(lease.path.read_text())
        lease.path.write_text(json.dumps({**held, "host": "another-machine", "renewed": time_there, "expires": time_there + 60}))

    def ask(time_there: float):
        return acquire_lease(tmp_path, 60, clock=lambda: time_there + skew)

    renewed_at(1000.0)
    for time_there in (1000.0, 1050.0):
        with pytest.raises(LeaseHeld, match=rf"on another-machine since .* run the command again in {60 - time_there + 1000:.0f} s"):
            ask(time_there)
        assert lease_holder(tmp_path, clock=lambda: time_there + skew)["host"] == "another-machine"  # noqa: B023
    renewed_at(1055.0)
    for time_there in (1061.0, 1100.0):
        with pytest.raises(LeaseHeld):
            ask(time_there)
    with pytest.raises(LeaseHeld):
        acquire_lease(tmp_path, 60, clock=lambda: 900.0 + skew)  # this machine's clock was set back: it counts anew
    with pytest.raises(LeaseHeld):
        ask(950.0)
    assert lease_holder(tmp_path, clock=lambda: 961.0 + skew) is None
    assert ask(961.0).token == 2


def test_a_reused_process_number_is_not_the_holder(tmp_path: Path):
    lease = acquire_lease(tmp_path)
    held = json.loads(lease.path.read_text())
    lease.path.write_text(json.dumps({**held, "process_started": held["process_started"] - 100}))
    assert lease_holder(tmp_path) is None
    assert acquire_lease(tmp_path).token == 2
    with pytest.raises(LeaseHeld):
        acquire_lease(tmp_path)


def test_a_fenced_controller_can_write_nothing_more(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.append({"event": "run_started"})
        held = json.loads(journal.lease.path.read_text())
        journal.lease.path.write_text(json.dumps({**held, "token": 9, "pid": 1}))
        with pytest.raises(LeaseLost):
            journal.append({"event": "run_failed"})
        with pytest.raises(LeaseLost):
            renew_lease(journal.lease)
    assert [event["event"] for event in read_journal(tmp_path).events] == ["run_started"]
    assert json.loads((tmp_path / "controller.lease").read_text())["token"] == 9, "the new holder's lease is left alone"


def test_a_living_controller_renews_its_lease(tmp_path: Path):
    with Journal(tmp_path, lease_seconds=0.4) as journal:
        first = json.loads(journal.lease.path.read_text())["expires"]
        deadline = time.monotonic() + 5
        while json.loads(journal.lease.path.read_text())["expires"] <= first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_requests_wait_in_order(tmp_path: Path):
    first = leave_request(tmp_path, {"event": "pause_requested"}, clock=lambda: 10.0)
    second = leave_request(tmp_path, {"event": "suspend_requested"}, clock=lambda: 11.0)
    assert [request["command"] for _, request in pending_requests(tmp_path)] == [first, second]
