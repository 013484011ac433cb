"""Whole tensors, each on the one rank that wants it, from the stretches that all ranks hold.

For whoever needs a tensor in one place, as a file of a final directory does: tensors are dealt to ranks in groups, and in each round every
rank sends every other what that one's tensors lack, in one exchange. A rank sends what it holds, receives what it was dealt, and keeps
ROUND_BYTES (or one group, if that is more) of each at a time: nothing grows with the model but with the model divided by the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from terrace.train.strategies.shards import Shard
from terrace.worker.collectives import gather_objects
from terrace.worker.context import WorkerContext

ROUND_BYTES = 256 * 2**20  # per rank, of what it is dealt in a round
Group = tuple[int, Sequence[str]]  # the rank that wants these tensors together


class HeldTensors:
    """What the ranks hold together: shapes and every rank's stretches by name, and this one's numbers. All ranks make one at a time."""

    def __init__(self, shards: Iterable[Shard], context: WorkerContext) -> None:
        self.context = context
        self.own = {shard.name: shard for shard in shards}
        facts = [(shard.name, shard.shape, shard.values.dtype, shard.start, shard.values.numel()) for shard in self.own.values()]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.stretches: dict[str, list[tuple[int, int, int]]] = {}  # (rank, first number, numbers)
        for rank, found in enumerate(gather_objects(facts, context)):
            for name, shape, dtype, start, numbers in found:
                self.shapes[name], self.dtypes[name] = shape, dtype
                self.stretches.setdefault(name, []).append((rank, start, numbers))

    def bytes_of(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def hand_over(self, groups: Sequence[Group]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """(number of the group, its tensors on the CPU) for the groups of this rank, in order. All ranks call it with the same groups and
        take it to the end: every round is an exchange."""
        for dealt in self._rounds(groups):
            wanted = {rank: [name for number in numbers for name in groups[number][1]] for rank, numbers in dealt.items()}
            tensors = self._exchange(wanted)
            for number in dealt.get(self.context.rank, ()):
                yield number, {name: tensors.pop(name) for name in groups[number][1]}

    def _rounds(self, groups: Sequence[Group]) -> Iterator[dict[int, list[int]]]:
        """Numbers of groups by rank, round after round."""
        waiting: dict[int, list[int]] = {}
        for number in reversed(range(len(groups))):
            waiting.setdefault(groups[number][0], []).append(number)
        while waiting:
            dealt: dict[int, list[int]] = {}
            for rank, numbers in list(waiting.items()):
                size = 0
                while numbers and (size == 0 or size + self._group_bytes(groups[numbers[-1]]) <= ROUND_BYTES):
                    size += self._group_bytes(groups[numbers[-1]])
                    dealt.setdefault(rank, []).append(numbers.pop())
                if not numbers:
                    del waiting[rank]
            yield dealt

    def _group_bytes(self, group: Group) -> int:
        return sum(self.bytes_of(name) for name in group[1])

    def _exchange(self, wanted: dict[int, list[str]]) -> dict[str, torch.Tensor]:
        """One round: the tensors that this rank wants."""
        rank, ranks, device = self.context.rank, self.context.world_size, self.context.device
        mine = wanted.get(rank, [])
        if ranks == 1:
            return {name: self.own[name].values.cpu().reshape(self.shapes[name]) for name in mine}
        sent = [[self.own[name] for name in wanted.get(other, ()) if name in self.own] for other in range(ranks)]
        parts = [_as_bytes(shard.values).to(device) for shards in sent for shard in shards]
        outgoing = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
        del parts
        expected = [[(name, place) for name in mine for place in self.stretches[name] if place[0] == other] for other in range(ranks)]
        sizes = [sum(place[2] * self.dtypes[name].itemsize for name, place in found) for found in expected]
        incoming = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        given = [sum(_as_bytes(shard.values).numel() for shard in shards) for shards in sent]
        dist.all_to_all_single(incoming, outgoing, sizes, given)
        incoming = incoming.cpu()
        tensors = {name: torch.empty(self.shapes[name], dtype=self.dtypes[name]) for name in mine}
        at = 0
        for name, (_, start, numbers) in (one for found in expected for one in found):
            width = self.dtypes[name].itemsize
            _as_bytes(tensors[name])[start * width : (start + numbers) * width] = incoming[at : at + numbers * width]
            at += numbers * width
        return tensors


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
