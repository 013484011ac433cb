"""The process in which vLLM decodes: its end reaches who waits for it.

vLLM 0.30 to 0.32 notice that the process is gone, but their synchronous client goes on waiting for its next answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any


def watch(core: Any, error: Callable[[], Exception]) -> None:
    """When a process of the engine core ends, raise `error()` in every call that waits for it, and in later ones.

    `core` is the LLM engine's `engine_core`; one that decodes in this process has nothing to watch.
    """
    resources = getattr(core, "resources", None)
    manager = getattr(resources, "engine_manager", None)
    if manager is None:
        return
    sentinels = [process.sentinel for process in manager.processes]

    def tell() -> None:
        wait(sentinels)
        resources.engine_dead = True  # first, so that no further call is sent
        core.outputs_queue.put_nowait(error())
        for answer in list(core.utility_results.values()):
            if not answer.done():
                answer.set_exception(error())

    threading.Thread(target=tell, name="vllm-process", daemon=True).start()
