"""Muon's matrices, shared over ranks that hold all weights and gradients alike: a rank steps its share, then all get the new weights.

Orthogonalising costs a rank as much as thirty products of a matrix with itself, whatever the number of packs; on every rank alike that is
work done in vain. Each matrix has one owner, who alone keeps its momentum. The weights that come out are the same bits as if every rank
had stepped every matrix, because the owner computes what each of them would have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

BUCKET_NUMBERS = 2**22  # matrices below this size are sent together; larger ones go from where they lie
UNDER_WAY = 4  # sendings at a time, so that their buffers stay small beside the model


@dataclass(frozen=True)
class MatrixShares:
    """Who steps which matrix (`owners`: rank by name, the same on every rank), seen from one rank."""

    rank: int
    owners: Mapping[str, int]

    def elsewhere(self, name: str) -> bool:
        """Whether another rank steps this matrix. False for what every rank steps itself."""
        return self.owners.get(name, self.rank) != self.rank

    def exchange(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Every owner's tensor replaces the others', of those in `owners`. All ranks call it with the same names."""
        under_way: deque[tuple[dist.Work, torch.Tensor, list[torch.Tensor]]] = deque()
        with torch.no_grad():
            for owner, names in _buckets(self.owners, tensors):
                members = [tensors[name].detach() for name in names]
                flat = members[0] if len(members) == 1 and members[0].is_contiguous() else torch.cat([one.reshape(-1) for one in members])
                awaited = [] if owner == self.rank or flat is members[0] else members
                under_way.append((dist.broadcast(flat, owner, async_op=True), flat, awaited))
                if len(under_way) == UNDER_WAY:
                    _receive(*under_way.popleft())
            while under_way:
                _receive(*under_way.popleft())


def shared_out(shapes: Mapping[str, Sequence[int]], ranks: int) -> dict[str, int]:
    """An owner for every matrix, so that the costliest share is small: the costliest first, each to the rank with least to do."""
    costs = {name: _cost(*shape) for name, shape in shapes.items()}
    load, owners = [0] * ranks, {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[name]] += costs[name]
    return owners


def _cost(rows: int, columns: int) -> int:
    """Multiplications of one Newton-Schulz iteration, which works on the shorter side."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


def _buckets(owners: Mapping[str, int], tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, list[str]]]:
    """(owner, names) of tensors that are sent together, in the same order on every rank."""
    for owner in sorted(set(owners.values())):
        names: list[str] = []
        numbers = 0
        for name in sorted(one for one, rank in owners.items() if rank == owner and one in tensors):
            size = tensors[name].numel()
            if names and numbers + size > BUCKET_NUMBERS:
                yield owner, names
                names, numbers = [], 0
            names.append(name)
            numbers += size
        if names:
            yield owner, names


def _receive(work: dist.Work, flat: torch.Tensor, members: list[torch.Tensor]) -> None:
    """Wait for a sending, and put what came into its places; without any it is there already."""
    work.wait()
    at = 0
    for member in members:
        member.copy_(flat[at : at + member.numel()].view(member.shape))
        at += member.numel()
