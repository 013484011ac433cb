"""The process in which vLLM decodes: its end reaches who waits for it, and the end of who waits reaches it.

vLLM 0.30 to 0.32 notice that the process is gone, but their synchronous client goes on waiting for its next answer. And
nothing tells the process that its trainer was killed: it would keep the GPU's memory, which the next attempt needs.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

GUARD = """
import os, signal, sys
handles = [os.pidfd_open(int(number)) for number in sys.argv[1:]]
if not sys.stdin.buffer.read():
    for handle in handles:
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            pass
"""


class Guard:
    """Kills processes as soon as this one ends without `release`, however it ends: a process that reads from this one."""

    def __init__(self, numbers: Sequence[int]) -> None:
        words = [sys.executable, "-c", GUARD, *map(str, numbers)]
        self._reader = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)

    def release(self) -> None:
        self._reader.communicate(b"ended")


def watch(core: Any, error: Callable[[], Exception]) -> Guard | None:
    """When a process of the engine core ends, raise `error()` in every call that waits for it, and in later ones; when this
    process ends, end it too.

    `core` is the LLM engine's `engine_core`. One that decodes in this process has nothing to watch: None.
    """
    resources = getattr(core, "resources", None)
    manager = getattr(resources, "engine_manager", None)
    if manager is None:
        return None
    processes = list(manager.processes)

    def tell() -> None:
        wait([process.sentinel for process in processes])
        resources.engine_dead = True  # first, so that no further call is sent
        core.outputs_queue.put_nowait(error())
        for answer in list(core.utility_results.values()):
            if not answer.done():
                answer.set_exception(error())

    threading.Thread(target=tell, name="vllm-process", daemon=True).start()
    return Guard([process.pid for process in processes])
