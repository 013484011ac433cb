"""The few collectives the loop itself needs, which do nothing when there is one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from terrace.worker.context import WorkerContext


def gather_rows(values: Sequence[float], context: WorkerContext) -> np.ndarray:
    """float64 [world_size, len(values)]: every rank's row, the same on every rank."""
    if context.world_size == 1:
        return np.asarray([values], np.float64)
    row = torch.tensor(values, dtype=torch.float64, device=context.device)
    rows = [torch.empty_like(row) for _ in range(context.world_size)]
    dist.all_gather(rows, row)
    return torch.stack(rows).cpu().numpy()


def sum_over_ranks(values: Sequence[float], context: WorkerContext) -> np.ndarray:
    """float64 [len(values)]: the ranks' rows added up, the same on every rank; for rows too long to be gathered."""
    if context.world_size == 1:
        return np.asarray(values, np.float64)
    row = torch.tensor(values, dtype=torch.float64, device=context.device)
    dist.all_reduce(row)
    return row.cpu().numpy()


def gather_objects(value: Any, context: WorkerContext) -> list[Any]:
    """Every rank's value, on every rank. For rare events only: it pickles."""
    if context.world_size == 1:
        return [value]
    values: list[Any] = [None] * context.world_size
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(value: Any, context: WorkerContext) -> Any:
    """Rank 0's value on every rank."""
    if context.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier(context: WorkerContext) -> None:
    if context.world_size > 1:
        dist.barrier()
