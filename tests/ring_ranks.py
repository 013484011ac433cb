"""What test processes run to compare ring attention with attention over the whole pack."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from terrace.models import ring_attention as module
from terrace.models.attention import masked_segments, sdpa_segments
from terrace.models.sequence_parallel import SequenceGroup


def drawn(case: dict[str, Any], dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value of the whole pack and the gradient of what attention gives, the same on every rank."""
    generator = torch.Generator().manual_seed(case["tokens"])
    heads, keys, wide, narrow = case["heads"], case["keys"], case["wide"], case["narrow"]
    shapes = [(1, heads, case["tokens"], wide), (1, keys, case["tokens"], wide), (1, keys, case["tokens"], narrow)]
    shapes.append((1, case["tokens"], heads, narrow))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def whole(case: dict[str, Any], dtype: torch.dtype) -> list[torch.Tensor]:
    """What attention over the whole pack gives, and the gradients of query, key and value."""
    query, key, value, gradient = drawn(case, dtype)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    if case["window"]:
        out = masked_segments(query, key, value, case["boundaries"], case["scale"], None, case["window"])
    else:
        out = sdpa_segments(query, key, value, case["boundaries"], True, case["scale"])
    out.backward(gradient)
    return [out.detach(), query.grad, key.grad, value.grad]


def compare(rank: int, world_size: int, cases: dict[str, dict[str, Any]], dtype_name: str, tolerance: float) -> None:
    """This rank's part of every case by the ring, against the same part of the whole."""
    group = SequenceGroup(dist.new_group(list(range(world_size))), rank, world_size)
    dtype = getattr(torch, dtype_name)
    for name, case in cases.items():
        module.TILE_NUMBERS = case["tile"]
        share = case["tokens"] // world_size
        own = slice(rank * share, (rank + 1) * share)
        query, key, value, gradient = drawn(case, dtype)
        parts = [tensor[:, :, own].clone().requires_grad_() for tensor in (query, key, value)]
        out = module.ring_attention(*parts, case["boundaries"], case["scale"], case["window"], group)
        out.backward(gradient[:, own])
        expected = whole(case, torch.float32)
        found = [out.detach(), *(part.grad for part in parts)]
        wanted = [expected[0][:, own], *(tensor[:, :, own] for tensor in expected[1:])]
        for what, ours, theirs in zip(("out", "query", "key", "value"), found, wanted):
            assert ours.dtype == dtype
            difference = float((ours.float() - theirs).abs().max())
            assert difference <= tolerance * max(1.0, float(theirs.abs().max())), f"{name}, rank {rank}: {what} is off by {difference:g}"
