"""Runs on S3: conditional writes and the folder that follows the storage, from machines that share nothing else."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stored_run import Machines

from terrace.cluster.attempt_files import Fenced, claim_attempt, stop_requested
from terrace.curriculum.run import move_aside
from terrace.storage import conditional, mirror, synchronise
from terrace.storage import s3 as storage_module
from terrace.storage.conditional import Changed, read_versioned, write_if

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


def test_one_worker_of_a_machine_says_for_all_that_they_live(machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch):
    now = [1_000_000.0]
    monkeypatch.setattr(synchronise.time, "monotonic", lambda: now[0])
    with machines.on("a"):
        here, written = mirror.open_run(run), synchronise.Written()
        folder = here / "stages/01-warm/attempts/001"
        folder.mkdir(parents=True)
        ranks = [folder / f"alive-{rank:04d}.json" for rank in range(8)]

        def turn(alive: list[Path]) -> list[str]:
            """What goes up two seconds later, when these have touched their files."""
            now[0] += 2
            for path in alive:
                os.utime(path, (now[0], now[0]))
            machines.server.requests.clear()
            synchronise.synchronise(here, run, push_only=True, written=written)
            return [path.rpartition("-")[2] for method, path, _ in machines.server.requests if method == "PUT"]

        for rank, path in enumerate(ranks):
            path.write_text(json.dumps({"rank": rank, "pid": rank}))
        assert len(turn(ranks)) == 8, "who they are"
        assert [turn(ranks) for _ in range(6)] == [["0000.json"], [], ["0000.json"], [], ["0000.json"], []]
        assert [turn(ranks[3:]) for _ in range(3)] == [["0000.json"], [], ["0003.json"]], "of the dead ones the first was to speak"
        ranks[5].write_text(json.dumps({"rank": 5, "pid": 9}))
        assert turn(ranks[3:]) == ["0005.json"], "another process in its place"
        assert [turn(ranks[3:]) for _ in range(2)] == [["0003.json"], []]
        ranks[4].unlink()
        machines.server.requests.clear()
        synchronise.synchronise(here, run, push_only=True, written=written)
        assert ("DELETE", f"/{run.removeprefix('s3://')}/stages/01-warm/attempts/001/alive-0004.json", "") in machines.server.requests


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
