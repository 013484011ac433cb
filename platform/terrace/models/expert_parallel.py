"""Expert parallelism: the experts of every layer are divided over a group of ranks, and tokens travel to them.

Of each tensor [E, ...] of experts a rank holds the rows of its own E / S experts, under the tensor's own name. Routers run where the tokens
are. Every assignment of a token to an expert is sent to the rank that has the expert, which answers as the family's module does, and
the answer is sent back and weighted there: two all-to-alls per layer, forward and again backward, whose sizes the routers decide. Nothing
is dropped that one rank alone would not drop. Every rank issues the same exchanges whatever its tokens choose, and a rank that nobody
asks still answers nothing with a graph, or its neighbours would wait in backward.

Cost per layer and token: 2 k H numbers sent and received, forward, and as many backward, less those whose expert is at home (1 / S of
them where routers are balanced).

Letters: S ranks of a group, T tokens of a rank, E experts, k experts of a token, H width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from terrace.errors import InputError
from terrace.models.families.registry import family_of_model

Answers = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # tokens [T, H], chosen and weights [T, k] -> [T, H]


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that hold each expert once together; `rank` is this one's place among them. `replicas` hold what this rank holds."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    size: int
    replicas: Any
    replica: int
    replica_count: int


@dataclass(frozen=True)
class ExpertDivision:
    """Which tensors are divided, with their whole shapes: this rank has the group's `rank`-th of `size` equal runs of their rows."""

    group: ExpertGroup
    shapes: dict[str, tuple[int, ...]]


def open_expert_group(size: int, rank: int, world_size: int) -> ExpertGroup:
    """Groups of `size` neighbouring ranks. Collective: all ranks call it. Raises InputError if the ranks do not form such groups."""
    if world_size % size:
        raise InputError(f"{world_size} workers do not form groups of parallel.experts {size}")
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size, size)]
    replicas = [dist.new_group(list(range(place, world_size, size))) for place in range(size)]
    return ExpertGroup(groups[rank // size], rank % size, size, replicas[rank % size], rank // size, world_size // size)


def divide_experts(model: Any, group: ExpertGroup) -> ExpertDivision:
    """Leave a skeleton on the meta device this rank's experts only, and let tokens travel. Raises InputError where it has none, or a number
    that the group does not divide."""
    names = {id(module): name for name, module in model.named_modules()}
    holders = family_of_model(model).experts(model)
    if not holders:
        raise InputError("parallel.experts: this model has no experts; leave it out")
    shapes = {}
    for holder in holders:
        tensors = dict(holder.named_parameters(recurse=False))
        counts = {len(tensor) for tensor in tensors.values()}
        count = max(counts)
        if len(counts) > 1 or count % group.size:
            raise InputError(f"parallel.experts {group.size} does not divide the {count} experts of {names[id(holder)]}")
        for leaf, tensor in tensors.items():
            shapes[f"{names[id(holder)]}.{leaf}"] = tuple(tensor.shape)
            own = torch.empty((count // group.size, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
            setattr(holder, leaf, torch.nn.Parameter(own, requires_grad=tensor.requires_grad))
        if hasattr(holder, "num_experts"):
            holder.num_experts = count // group.size
        answers = "answers" if hasattr(holder, "answers") else "forward"
        setattr(holder, answers, functools.partial(_answer_together, holder, getattr(holder, answers), count, group))
    return ExpertDivision(group, shapes)


def _answer_together(
    holder: Any, answers: Answers, experts: int, group: ExpertGroup, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What `answers` of all experts would give. `chosen` int64 [T, k]; `experts` there means no expert at all."""
    own = experts // group.size
    rows, places = torch.nonzero(chosen < experts, as_tuple=True)
    order = chosen[rows, places].argsort(stable=True)
    rows, places = rows[order], places[order]
    asked = torch.bincount(chosen[rows, places], minlength=experts)
    wanted = torch.empty_like(asked)  # [S, own], flat: what each rank asks each expert of this one
    dist.all_to_all_single(wanted, asked, group=group.group)
    sent = asked.view(group.size, own).sum(dim=1).tolist()
    received = wanted.view(group.size, own).sum(dim=1).tolist()
    numbers = torch.arange(own, device=tokens.device).repeat(group.size).repeat_interleave(wanted)
    kind = tokens.device.type
    carried = tokens.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tokens
    mine = _Exchange.apply(carried[rows], received, sent, group)
    answer = answers(mine, numbers[:, None], mine.new_ones(len(mine), 1)) if len(mine) else _no_answer(holder, mine)
    back = _Exchange.apply(answer.to(carried.dtype), sent, received, group)
    return torch.zeros_like(tokens).index_add(0, rows, (back * weights[rows, places, None]).to(tokens.dtype))


def _no_answer(holder: Any, mine: torch.Tensor) -> torch.Tensor:
    """No rows, in whose graph the experts stand: backward gives them a gradient of zero, and calls the exchange before them."""
    return mine + sum(tensor[:0].sum() for tensor in holder.parameters(recurse=False)).to(mine.dtype)


class _Exchange(torch.autograd.Function):
    """Rows to the ranks of the group, `sent` of them to each, and `received` of them from each; the gradient goes the way back."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor, received: Sequence[int], sent: Sequence[int], group: ExpertGroup) -> torch.Tensor:
        context.way_back = (sent, received, group)
        return exchange_rows(rows, received, sent, group)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return exchange_rows(gradient, *context.way_back), None, None, None


def exchange_rows(rows: torch.Tensor, received: Sequence[int], sent: Sequence[int], group: ExpertGroup) -> torch.Tensor:
    found = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(found, rows.contiguous(), list(received), list(sent), group=group.group)
    return found
