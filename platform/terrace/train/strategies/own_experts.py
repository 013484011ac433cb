"""What a strategy whose ranks hold whole weights does differently for experts that are divided over ranks (models.expert_parallel).

A rank has a run of rows of each tensor of experts; the ranks at its place in the other groups (replicas) have the same. In and out
they go as stretches of the whole tensor, under its name, so a checkpoint does not know of the division. Their gradients hold what all
ranks of the group sent, so they are summed over replicas alone and divided by all ranks, as DDP divides the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from terrace.models.expert_parallel import ExpertDivision
from terrace.models.tensor_files import Stretch
from terrace.models.weights import TensorSource, stretches_of
from terrace.train.strategies.shards import Shard, divided, even_share


class OwnExperts:
    """The divided tensors of one rank, by name."""

    def __init__(self, division: ExpertDivision, world_size: int) -> None:
        self._group, self._shapes, self._world_size = division.group, division.shapes, world_size

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def local_shape(self, name: str) -> tuple[int, ...]:
        rows, *rest = self._shapes[name]
        return (rows // self._group.size, *rest)

    def _start(self, name: str) -> int:
        return self._group.rank * math.prod(self.local_shape(name))

    def read(self, source: TensorSource, name: str) -> torch.Tensor:
        """This rank's rows of a tensor of a source, of which each replica reads its share. All ranks call it in the same order."""
        numbers, start = math.prod(self.local_shape(name)), self._start(name)
        first, last = even_share(numbers, self._group.replica, self._group.replica_count)
        [found] = stretches_of(source, [Stretch(name, start + first, start + last)])
        if self._group.replica_count == 1:
            return found.reshape(self.local_shape(name))
        share = torch.zeros(-(-numbers // self._group.replica_count), dtype=found.dtype)
        share[: len(found)] = found
        return self._from_all(share, self._group.replicas, self._group.replica_count)[:numbers].reshape(self.local_shape(name))

    def shards(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Shard]:
        """This rank's share of these, as stretches of the whole."""
        own = [Shard(name, self._shapes[name], self._start(name), tensor.detach().reshape(-1)) for name, tensor in tensors]
        yield from divided(own, self._group.replica, self._group.replica_count)

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The whole tensor; all ranks call it."""
        return self._from_all(tensor.detach().reshape(-1), self._group.group, self._group.size).reshape(self._shapes[name])

    @staticmethod
    def _from_all(share: torch.Tensor, group: Any, count: int) -> torch.Tensor:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
        parts = torch.empty(count * share.numel(), dtype=share.dtype, device=device)
        dist.all_gather_single(parts, share.to(device), group=group)
        return parts

    def reduce(self, parameters: Mapping[str, Any]) -> None:
        """Make gradients of this rank's experts those of the global batch, as DDP does with the others: the mean over all ranks."""
        for name in self._shapes:
            parameter = parameters[name]
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self._group.replica_count > 1:
                dist.all_reduce(parameter.grad, group=self._group.replicas)
            parameter.grad.div_(self._world_size)

    def norm(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Global norm of gradients of which some belong to experts of this rank alone."""
        parts = [[gradient for name, gradient in gradients.items() if (name in self) is own] for own in (False, True)]
        device = next(iter(gradients.values())).device
        alike, own = (torch.nn.utils.get_total_norm(part).to(device) ** 2 for part in parts)
        dist.all_reduce(own, group=self._group.group)
        return (alike + own).sqrt()
