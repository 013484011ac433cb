"""The launcher for one machine without Ray: an attempt is one process per worker, all of them started by this one.

It is `ranks_launcher` with this process in the place of torchrun: no cluster starts and no port is opened for orders, and a
stage begins after the seconds that importing takes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from terrace.cluster.ranks import Ranks
from terrace.cluster.ranks_launcher import RanksLauncher
from terrace.cluster.ranks_worker import Attempts
from terrace.recipe.schema import Recipe, Stage


class ProcessLauncher(RanksLauncher):
    """Runs attempts one at a time, each in processes of its own."""

    name = "process"

    def __init__(self, recipe: Recipe, run_stage: Callable[..., Any]):
        self._folder = Path(tempfile.mkdtemp(prefix="terrace-process-"))
        count = max(ranks_here(stage, os.cpu_count() or 1) for stage in recipe.stages)
        first = Ranks(0, count, 0, "", 0, "terrace/0", hosted=False, file=str(self._folder / "orders"))
        super().__init__(recipe, run_stage, first)
        everybody = [dataclasses.replace(first, rank=rank, local_rank=rank) for rank in range(count)]
        self._attempts = _AllAttempts([Attempts(ranks, run_stage) for ranks in everybody])

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


class _AllAttempts:
    """`Attempts` of all ranks in one process."""

    def __init__(self, attempts: list[Attempts]):
        self._attempts = attempts

    def look(self) -> None:
        for attempts in self._attempts:
            attempts.look()

    def kill_all(self) -> None:
        for attempts in self._attempts:
            attempts.kill_all()


def ranks_here(stage: Stage, cores: int) -> int:
    """Processes for a stage on a machine of so many cores: what it asks for; of a range, one per core."""
    asked = stage.resources.workers
    least, most = (asked, asked) if isinstance(asked, int) else asked
    return max(least, min(most, cores))
