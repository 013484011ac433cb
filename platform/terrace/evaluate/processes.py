"""Work in processes of this machine, one per worker."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from terrace.errors import TerraceError

Result = TypeVar("Result")


def in_processes(calls: Sequence[Callable[[], Result]], what: str) -> list[Result]:
    """What each call returns, all at once; started afresh, since a forked process cannot use a GPU. `what` is named in an error."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(calls), mp_context=context) as pool:
        tasks = [pool.submit(call) for call in calls]
        try:
            return [task.result() for task in tasks]
        except BrokenProcessPool as error:
            raise TerraceError(f"a worker of {what} died (out of memory?); use fewer --workers or a smaller --batch-size") from error
