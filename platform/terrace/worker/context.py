"""What a training process knows of its surroundings: rank, device, how to report, when to stop. Nothing of Ray.

The launcher makes one: for Ray Train, for torchrun, or for a test with two gloo processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from terrace.errors import InputError


def _no_report(_metrics: dict[str, Any], _checkpoint: Path | None) -> None:
    return None


def _never() -> str | None:
    return None


@dataclass
class WorkerContext:
    """`report(metrics, checkpoint)` is called by every rank at every checkpoint; `should_stop()` by every rank once
    per step, and returns a reason when the run must save and end. Either may be a barrier."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    report: Callable[[dict[str, Any], Path | None], None] = field(default=_no_report)
    should_stop: Callable[[], str | None] = field(default=_never)


def data_place(context: WorkerContext, sequence_parallel: int) -> tuple[int, int]:
    """(rank, number) among those that take different packs: groups of `sequence_parallel` neighbours share theirs."""
    if context.world_size % sequence_parallel:
        raise InputError(
            f"{context.world_size} workers do not form groups of parallel.sequence_parallel {sequence_parallel}; "
            "change resources.workers or parallel.sequence_parallel"
        )
    return context.rank // sequence_parallel, context.world_size // sequence_parallel
