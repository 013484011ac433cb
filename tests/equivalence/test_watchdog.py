"""A rank that stalls ends the run with the ranks, the step and the stacks of all, instead of waiting for ever."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from packs import tiny_recipe
from processes import free_port

from terrace.cluster.attempt_outcome import outcome
from terrace.train.watchdog import Watchdog, describe, hang_folder, hang_timeout_seconds
from terrace.worker.context import WorkerContext

STALLED_STEP = 2


def stall(rank: int, world_size: int, port: int, folder: str) -> None:
    """One rank of a stage whose rank 1 gets no data for step 2."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import dataclasses

    import torch
    import torch.distributed as dist
    from ranks import memory_feed, train


    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    recipe = tiny_recipe(failure={"hang_timeout_seconds": 3})
    context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
    feed = memory_feed(recipe, 0, context)

    def stalling(start):
        for step_input in feed.stream(start):
            if rank == 1 and step_input.step == STALLED_STEP - 1:
                data_that_never_comes()
            yield step_input

    train(recipe, 0, dataclasses.replace(feed, stream=stalling), Path(folder), None, context, attempt=4)


def data_that_never_comes() -> None:
    time.sleep(600)


def test_a_stalled_rank_ends_the_run_with_every_ranks_stack(tmp_path):
    spawn, port = multiprocessing.get_context("spawn"), free_port()
    workers = [spawn.Process(target=stall, args=(rank, 2, port, str(tmp_path)), daemon=True) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=90)
    alive = [worker.is_alive() for worker in workers]
    for worker in workers:
        worker.kill()
    assert alive == [False, False]
    assert [worker.exitcode for worker in workers] == [1, 1]
    folder = hang_folder(tmp_path, 4)
    message = json.loads((folder / "summary.json").read_text())["message"]
    assert "rank 1 waiting for the data of step 2" in message
    assert "rank 0 counting the batch of all ranks of step 2" in message
    assert "data_that_never_comes" in (folder / "stacks-00001.txt").read_text()
    assert "gather_rows" in (folder / "stacks-00000.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1]


@pytest.fixture
def short(tmp_path):
    ended: list[int] = []
    watchdog = Watchdog(tmp_path / "hang" / "attempt-001", 0.3, WorkerContext(), "one", end=ended.append)
    return watchdog, ended, tmp_path / "hang"


def test_progress_and_rest_keep_it_quiet_and_leave_nothing(short):
    watchdog, ended, folder = short
    with watchdog:
        time.sleep(0.6)  # at rest until the first mark
        for _ in range(6):
            watchdog.mark(1, "working on")
            time.sleep(0.1)
        watchdog.rest()
        time.sleep(0.6)
    assert ended == []
    assert not folder.exists()


def test_silence_after_a_mark_ends_the_process(short):
    watchdog, ended, folder = short
    with watchdog:
        watchdog.mark(7, "working on")
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended == [1]
    seen = outcome(folder.parent, "one", 1)  # what the launcher makes of it
    assert (seen.status, seen.failure, seen.reason) == ("failed", "infrastructure", "Hang")
    assert "rank 0 working on step 7" in seen.message
    assert outcome(folder.parent, "one", 2) is None


def test_the_message_names_those_behind_first_and_those_that_say_nothing():
    def seen(rank, step, doing):
        return {"rank": rank, "step": step, "doing": doing, "seconds": 900.0}

    ranks = [seen(0, 9, "in step of"), seen(1, 8, "waiting for the data of"), seen(3, 9, "in step of")]
    message = describe("warm", ranks, 5, Path("there"))
    assert message == (
        "stage warm: no progress for 900 s: rank 1 waiting for the data of step 8; ranks 0, 3 in step of step 9; "
        "ranks 2, 4 said nothing (ended, or held in native code). Stacks of every rank: there"
    )


def test_the_default_is_half_the_stall_timeout():
    assert hang_timeout_seconds(tiny_recipe().stages[0]) == 900
    assert hang_timeout_seconds(tiny_recipe(failure={"hang_timeout_seconds": 60}).stages[0]) == 60
