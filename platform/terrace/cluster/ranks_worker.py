"""What a rank does with an order of rank 0: a process of its own for each attempt, so that memory and CUDA end with the attempt."""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from terrace.cluster.attempt_files import write_outcome
from terrace.cluster.local_worker import Surroundings, process_group_backend, run_surrounded
from terrace.cluster.ranks import LOOK_SECONDS, SIGNALS, Ranks, deaf_to_signals, ordered, ranks_of, store_of
from terrace.errors import InputError, TerraceError
from terrace.recipe.schema import Recipe
from terrace.storage import mirror
from terrace.storage.run_layout import stage_directory

_PR_SET_PDEATHSIG = 1
GROUP_SECONDS = 1800


class Attempts:
    """The processes of this rank, each of which calls `run_stage`. An attempt goes by the number of its order, since every stage has
    a first one; its end is told in the store: `ended/NUMBER/RANK`."""

    def __init__(self, ranks: Ranks, run_stage: Callable[..., Any]):
        self._ranks, self._run_stage = ranks, run_stage
        self._next = 1
        self._processes: dict[int, multiprocessing.process.BaseProcess] = {}  # number of the order -> its process

    def look(self) -> None:
        """Take the orders that are new, and tell of what has ended."""
        while (what := ordered(self._ranks, self._next)) is not None:
            if what["kind"] == "launch":
                self._launch(what, self._next)
            elif (process := self._processes.get(what["order"])) is not None:
                process.kill()
            self._next += 1
        for number, process in list(self._processes.items()):
            if process.exitcode is not None:
                store_of(self._ranks).set(f"ended/{number}/{self._ranks.rank}", str(process.exitcode))
                del self._processes[number]

    def kill_all(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()

    def _launch(self, what: dict[str, Any], number: int) -> None:
        if self._ranks.rank >= what["workers"]:
            return
        config = {**what["config"], "recipe": Recipe.model_validate(what["config"]["recipe"]), "run_stage": self._run_stage}
        resources = config["recipe"].stages[config["stage_index"]].resources
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(resources.cpus_per_worker)))  # read when the new process imports torch
        process = multiprocessing.get_context("spawn").Process(
            target=_attempt, args=(self._ranks, what["workers"], config, os.getpid(), number), name=f"attempt-{number}"
        )
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the process itself has said that it is deaf to them
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._processes[number] = process


def led(lead: Callable[[], int], run_stage: Callable[..., Any]) -> int:
    """Run the command: `lead` in rank 0, its orders in the others, which call `run_stage`. All end with its exit status."""
    ranks = ranks_of()
    if ranks.rank > 0:
        return follow(ranks, run_stage)
    status = 1
    try:
        status = lead()
    except TerraceError as error:
        status = error.exit_status
        raise
    finally:
        dismiss(ranks, status)
    return status


def dismiss(ranks: Ranks, status: int) -> None:
    """Send the others home, and wait a little for them: the store ends with this process where it is ours."""
    if ranks.world_size == 1:
        return
    store = store_of(ranks)
    store.set("end", str(status))
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline and not all(store.check([f"gone/{rank}"]) for rank in range(1, ranks.world_size)):
        time.sleep(LOOK_SECONDS)


def follow(ranks: Ranks, run_stage: Callable[..., Any]) -> int:
    """A rank that is not the first: do what is ordered until all are sent home; its exit status is rank 0's."""
    deaf_to_signals()
    attempts, store = Attempts(ranks, run_stage), store_of(ranks)
    try:
        while not store.check(["end"]):
            attempts.look()
            time.sleep(LOOK_SECONDS)
        status = int(store.get("end"))
        attempts.kill_all()
        store.set(f"gone/{ranks.rank}", "1")
    except (RuntimeError, OSError) as error:  # the store is gone, and rank 0 with it
        attempts.kill_all()
        print(f"terrace: rank {ranks.rank}: rank 0 is gone ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    return status


def _attempt(ranks: Ranks, workers: int, config: dict[str, Any], parent: int, number: int) -> None:
    """In the attempt's process. What went wrong is in the outcome and in the rank's log: nothing of it is printed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    deaf_to_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    import torch.distributed as dist

    try:
        place = _joined(ranks, workers, config, number)
    except BaseException as error:
        _leave_outcome(config, ranks.rank, error)
        os._exit(1)
    try:
        run_surrounded(config, place)
    except BaseException:
        os._exit(1)  # not through the group's end, which waits for ranks that are still at work
    dist.destroy_process_group()


def _joined(ranks: Ranks, workers: int, config: dict[str, Any], number: int) -> Surroundings:
    """This rank's device, and the group of the attempt's ranks."""
    import torch.distributed as dist

    stage = config["recipe"].stages[config["stage_index"]]
    device = _device(ranks, stage.name) if stage.resources.gpus_per_worker else "cpu"
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(workers), LOCAL_RANK=str(ranks.local_rank))
    client = dataclasses.replace(ranks, hosted=True)  # of the store that is there: rank 0's first process, or torchrun, has opened it
    store = dist.PrefixStore(f"attempt-{number}", store_of(client))
    dist.init_process_group(
        "gloo" if device == "cpu" else process_group_backend(stage) or "nccl", store=store, rank=ranks.rank, world_size=workers,
        timeout=datetime.timedelta(seconds=GROUP_SECONDS),
    )  # fmt: skip
    return Surroundings(ranks.rank, workers, ranks.local_rank, device)


def _leave_outcome(config: dict[str, Any], rank: int, error: BaseException) -> None:
    """Why the rank never came to the stage."""
    stage = config["recipe"].stages[config["stage_index"]]
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    told = message if isinstance(error, TerraceError) else f"{type(error).__name__}: {message}"
    with mirror.following(run_dir := mirror.open_run(config["run_dir"], admitted=True)):
        write_outcome(
            stage_directory(run_dir, config["stage_index"], stage.name), config["attempt"], rank,
            {"rank": rank, "status": "failed", "error": type(error).__name__, "message": told, "time": time.time(),
             "exit_status": getattr(error, "exit_status", 1), "consequence": not isinstance(error, TerraceError)},
        )  # fmt: skip


def _device(ranks: Ranks, stage: str) -> str:
    """This rank's GPU: the only one it sees (srun's `--gpus-per-task`), or the one of its place on the machine."""
    import torch

    count = torch.cuda.device_count()
    if count == 0 or (count > 1 and ranks.local_rank >= count):
        raise InputError(
            f"stage {stage} has resources.gpus_per_worker, and rank {ranks.rank}, number {ranks.local_rank} of its machine,"
            f" sees {count} GPUs"
        )
    index = ranks.local_rank if count > 1 else 0
    torch.cuda.set_device(index)
    return f"cuda:{index}"
