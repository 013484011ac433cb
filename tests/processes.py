"""Run a function in several gloo processes, with a time limit, and get what each returned."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as multiprocessing


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _enter(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple, answers: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        answers.put((rank, True, function(rank, world_size, *arguments)))
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 180.0) -> list[Any]:
    """`function(rank, world_size, *arguments)` in `world_size` processes; the results by rank.

    The function must be importable by name. A rank that fails or hangs fails the call, with its trace; all are ended.
    """
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    port = free_port()
    workers = [
        spawn.Process(target=_enter, args=(rank, world_size, port, function, arguments, answers), daemon=True)
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            rank, good, value = answers.get(timeout=timeout)
            if not good:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        for worker in workers:
            worker.join(timeout=30)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
    return [results[rank] for rank in range(world_size)]
