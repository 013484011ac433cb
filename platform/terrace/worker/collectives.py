"""The few collectives the loop itself needs, which do nothing when there is one process."""

from __future__ import annotations

import pickle
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


def gather_tensors(rows: torch.Tensor, counts: Sequence[int], context: WorkerContext) -> torch.Tensor:
    """[sum of counts, ...]: the rows of every rank, in the order of ranks; `counts` says how many each has."""
    if context.world_size == 1:
        return rows
    most = max(counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def pass_on(tensors: Sequence[torch.Tensor], context: WorkerContext) -> list[torch.Tensor]:
    """Give tensors to the next rank and take as many, of the same shapes, from the one before; ranks form a ring."""
    if context.world_size == 1:
        return list(tensors)
    following, before = (context.rank + 1) % context.world_size, (context.rank - 1) % context.world_size
    taken = [torch.empty_like(tensor) for tensor in tensors]
    moves = [dist.P2POp(dist.isend, tensor.contiguous(), following) for tensor in tensors]
    moves += [dist.P2POp(dist.irecv, tensor, before) for tensor in taken]
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    return taken


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


def exchange_objects(parcels: Sequence[Any], context: WorkerContext) -> list[Any]:
    """What every rank has for this one, in the order of ranks: `parcels[r]` goes to rank r and to no other. It pickles."""
    if context.world_size == 1:
        return list(parcels)
    sent = [torch.frombuffer(bytearray(pickle.dumps(parcel)), dtype=torch.uint8).to(context.device) for parcel in parcels]
    sizes = gather_rows([float(len(one)) for one in sent], context).astype(int)  # [from, to]
    taken = [torch.empty(size, dtype=torch.uint8, device=context.device) for size in sizes[:, context.rank].tolist()]
    others = [rank for rank in range(context.world_size) if rank != context.rank]
    moves = [dist.P2POp(dist.isend, sent[rank], rank) for rank in others] + [dist.P2POp(dist.irecv, taken[rank], rank) for rank in others]
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    return [parcels[rank] if rank == context.rank else _opened(one) for rank, one in enumerate(taken)]


def _opened(parcel: torch.Tensor) -> Any:
    return pickle.loads(parcel.cpu().numpy().tobytes())  # noqa: S301 - made by a rank of this very stage


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
