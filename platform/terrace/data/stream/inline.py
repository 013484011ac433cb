"""Packs made in a thread of the process that trains: where there is no Ray, and while Ray's workers start."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from terrace.data.stream.tasks import PackTask, TaskSettings, make_pack
from terrace.data.types import PackedExample


def inline_packs(tasks: Iterator[PackTask], settings: TaskSettings, prefetch_packs: int) -> Iterator[PackedExample]:
    """The tasks' packs in order, at most `prefetch_packs` ahead. Close the iterator to stop early."""
    ready: deque[Future[PackedExample]] = deque()
    specs = (part for task in tasks for part in task.parts)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="terrace-decode") as pool:
        try:
            for spec in specs:
                ready.append(pool.submit(partial(make_pack, spec, settings)))
                if len(ready) > prefetch_packs:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
