"""Ranks as threads of one process: 32 of them cost one import, and torch's own threaded process group carries their collectives."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch._C._distributed_c10d as distributed
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded


def run_threads(ranks: int, work: Callable[[int, int], Any]) -> list[Any]:
    """`work(rank, ranks)` in threads that are ranks of one process group; the results by rank. The first error is raised."""
    results: list[Any] = [None] * ranks
    errors: list[str] = []
    distributed._set_thread_isolation_mode(True)  # names of groups belong to threads
    threaded._install_threaded_pg()
    store = dist.HashStore()

    def enter(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            results[rank] = work(rank, ranks)
        except BaseException as error:
            errors.append(traceback.format_exc())
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            with contextlib.suppress(BaseException):
                dist.destroy_process_group()

    try:
        threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        distributed._set_thread_isolation_mode(False)
    if errors:
        raise AssertionError(errors[0])
    return results
