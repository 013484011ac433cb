"""What a rank holds of tensors that are spread over ranks: stretches of numbers in row-major order, by parameter name.

Every strategy here splits so: FSDP by rows, ZeRO by numbers wherever a partition ends, and of what all ranks hold alike each takes an
equal stretch of all of it. So a part is (name, shape of the whole, first number, numbers), two layouts meet where intervals overlap, and
reading a part of a file is reading one range of bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from terrace.models.tensor_files import Stretch
from terrace.models.weights import TensorSource, part_shape, stretches_of
from terrace.worker.context import WorkerContext

AHEAD_BYTES = 128 * 2**20  # of float32, read together


@dataclass(frozen=True)
class Shard:
    """Numbers [start, start + len(values)) of a tensor. `values` is flat, and may be the very memory that trains."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    values: torch.Tensor

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.name, self.start, self.start + self.values.numel())

    @property
    def is_whole(self) -> bool:
        return self.values.numel() == math.prod(self.shape)


def whole_shard(name: str, tensor: torch.Tensor) -> Shard:
    """All of a tensor."""
    return Shard(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1))


def divided(shards: Iterable[Shard], place: int, places: int) -> Iterator[Shard]:
    """This holder's share of shards that `places` holders have alike: laid end to end and cut into equal stretches."""
    shards = list(shards)
    total = sum(shard.values.numel() for shard in shards)
    first, last = place * total // places, (place + 1) * total // places
    at = 0
    for shard in shards:
        size = shard.values.numel()
        low, high = max(first - at, 0), min(last - at, size)
        if low < high:
            yield Shard(shard.name, shard.shape, shard.start + low, shard.values[low:high])
        at += size


def even_share(numbers: int, place: int, places: int) -> tuple[int, int]:
    """Numbers [first, last) of one tensor that is cut into `places` stretches of one length; the last ones may be short or empty."""
    length = -(-numbers // places)
    return min(place * length, numbers), min((place + 1) * length, numbers)


def gather_even(shares: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], context: WorkerContext) -> list[torch.Tensor]:
    """The whole tensors, on the CPU, of which every rank gives its `even_share`, in one exchange. All ranks call it."""
    lengths = [-(-math.prod(shape) // context.world_size) * share.element_size() for share, shape in zip(shares, shapes)]
    own = torch.zeros(sum(lengths), dtype=torch.uint8)
    at = 0
    for share, length in zip(shares, lengths):
        flat = share.contiguous().view(torch.uint8)
        own[at : at + len(flat)] = flat
        at += length
    own = own.to(context.device)
    parts = torch.empty(context.world_size * len(own), dtype=torch.uint8, device=context.device)
    dist.all_gather_single(parts, own)
    parts = parts.cpu().view(context.world_size, -1)
    wholes = []
    at = 0
    for share, shape, length in zip(shares, shapes, lengths):
        numbers = parts[:, at : at + length].reshape(-1).view(share.dtype)
        wholes.append(numbers[: math.prod(shape)].reshape(shape))
        at += length
    return wholes


class ReadTogether:
    """Whole tensors for every rank, each byte of them read by one rank: all read a stretch and hand it to the others.

    For strategies whose ranks hold whole weights: 256 ranks that each fetched all of them would read the model 256 times. All ranks ask
    for the same tensors in the same order, most often that of `names`, along which up to AHEAD_BYTES are read at a time. What a source
    gives only whole (drawn, put together from others) every rank makes itself.
    """

    def __init__(self, source: TensorSource, names: Iterable[str], context: WorkerContext) -> None:
        self._source, self._context = source, context
        self._next = dict(itertools.pairwise(names))
        self._ahead: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self._ahead:
            if self._context.world_size == 1 or part_shape(self._source, name) is None:
                return self._source(name)
            self._read_from(name)
        return self._ahead.pop(name)

    def _read_from(self, name: str) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        size, following = 0, name
        while following is not None and following not in self._ahead and (shape := part_shape(self._source, following)) is not None:
            size += 4 * math.prod(shape)
            if shapes and size > AHEAD_BYTES:
                break
            shapes[following] = shape
            following = self._next.get(following)
        rank, ranks = self._context.rank, self._context.world_size
        wanted = [Stretch(one, *even_share(math.prod(shape), rank, ranks)) for one, shape in shapes.items()]
        shares = list(stretches_of(self._source, wanted))
        self._ahead.update(zip(shapes, gather_even(shares, list(shapes.values()), self._context)))
