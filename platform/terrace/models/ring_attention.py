"""Attention of a pack whose tokens lie on a ring of ranks: keys and values travel around it, queries stay.

Each of S ranks holds its own run of the pack's tokens, all heads of it. In S turns every rank meets the keys and values of every other,
one run at a time, and adds what its queries see there by the running maximum and sum of a softmax, so the result is that of attention
over the whole pack, whatever the number of heads. A run of later tokens is never seen (nothing is computed), and of an earlier run only
the segment that crosses from it into this one. The next run is under way while the present one is computed. In backward the gradients of
keys and values travel with them and are home after S turns.

Nothing as large as tokens times tokens is kept: scores exist in tiles of at most TILE_NUMBERS numbers, in float32, and backward computes
them again from the sums that forward left. Per layer and rank (S - 1) t K (D + V) numbers are sent forward and about three times as many
backward, half of what all-to-all sends only where there are few key/value heads; it has no bound on S.

Shape letters: S ranks, t tokens of a rank, H heads, K key/value heads, G = H / K, D and V head sizes of keys and values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

TILE_NUMBERS = 64 * 2**20  # scores of a tile: 256 MB
LEAST = -1e30  # a maximum before there was one; finite, so that differences of two of them are numbers


@dataclass(frozen=True)
class Seen:
    """Which tokens of the pack see which: those of the same segment (`boundaries`, from 0 to the pack's end) that are not later, and not
    further back than `window` tokens. `tokens` is a rank's share t; rank r holds tokens [r t, (r + 1) t)."""

    boundaries: tuple[int, ...]
    tokens: int
    window: int | None
    tile: tuple[int, int]  # queries and keys of a tile

    def tiles(self, rank: int, other: int) -> Iterator[tuple[slice, slice, bool]]:
        """Tiles in which queries of `rank` see keys of `other`, as slices of their own runs, and whether all see all there."""
        if other > rank:
            return
        mine, theirs = rank * self.tokens, other * self.tokens
        for start, end in itertools.pairwise(self.boundaries):
            q_first, q_last = max(start, mine), min(end, mine + self.tokens)
            k_first, k_last = max(start, theirs), min(end, theirs + self.tokens)
            if q_first >= q_last or k_first >= k_last:
                continue
            for q in range(q_first, q_last, self.tile[0]):
                q_end = min(q + self.tile[0], q_last)
                for k in range(k_first, min(k_last, q_end), self.tile[1]):
                    k_end = min(k + self.tile[1], k_last, q_end)
                    if self.window is not None and q - (k_end - 1) >= self.window:
                        continue
                    whole = k_end <= q + 1 and (self.window is None or q_end - 1 - k < self.window)
                    yield slice(q - mine, q_end - mine), slice(k - theirs, k_end - theirs), whole

    def hidden(self, rank: int, other: int, queries: slice, keys: slice, device: torch.device) -> torch.Tensor:
        """bool [queries, keys]: what is not seen in a tile."""
        q = torch.arange(queries.start, queries.stop, device=device)[:, None] + rank * self.tokens
        k = torch.arange(keys.start, keys.stop, device=device)[None] + other * self.tokens
        return (k > q) if self.window is None else (k > q) | (q - k >= self.window)


def ring_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: list[int], scale: float, window: int | None, group: Any
) -> torch.Tensor:
    """q [1, H, t, D], k [1, K, t, D], v [1, K, t, V] of this rank's tokens -> [1, t, H, V]. `boundaries` are the pack's segments'.

    Collective over the ranks of `group` (a models.sequence_parallel.SequenceGroup); so is its backward.
    """
    tokens = query.shape[2]
    if boundaries[-1] != tokens * group.size:
        raise ValueError(f"a pack of {boundaries[-1]} tokens is not {group.size} ranks' {tokens} each")
    keys_of_tile = min(4096, tokens)
    queries_of_tile = max(1, min(tokens, TILE_NUMBERS // (query.shape[1] * keys_of_tile)))
    seen = Seen(tuple(boundaries), tokens, window, (queries_of_tile, keys_of_tile))
    with torch.autocast(query.device.type, enabled=False):  # float32 products are meant
        out = _Ring.apply(query[0].unflatten(0, (key.shape[1], -1)), key[0], value[0], scale, seen, group)  # [K, G, t, V]
    return out.flatten(0, 1).transpose(0, 1).unsqueeze(0)


class _Ring(torch.autograd.Function):
    """q [K, G, t, D], k [K, t, D], v [K, t, V] -> [K, G, t, V]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: Seen, group: Any) -> torch.Tensor:
        shape = q.shape[:3]
        total = q.new_zeros(*shape, v.shape[-1], dtype=torch.float32)
        most, count = q.new_full(shape, LEAST, dtype=torch.float32), q.new_zeros(shape, dtype=torch.float32)
        for other, keys, values in _around(k, v, group):
            for rows, columns, whole in seen.tiles(group.rank, other):
                scores = _scores(q, keys, rows, columns, scale)
                if not whole:
                    scores.masked_fill_(seen.hidden(group.rank, other, rows, columns, q.device), LEAST * 2)
                before = most[:, :, rows]
                now = torch.maximum(before, scores.amax(-1))
                scores.sub_(now[..., None]).exp_()
                kept = (before - now).exp()
                count[:, :, rows] = count[:, :, rows] * kept + scores.sum(-1)
                added = (scores.flatten(1, 2) @ values[:, columns].float()).view(*scores.shape[:3], -1)
                total[:, :, rows] = total[:, :, rows] * kept[..., None] + added
                most[:, :, rows] = now
        out = (total / count[..., None]).to(v.dtype)
        ctx.save_for_backward(q, k, v, out, most + count.log())
        ctx.scale, ctx.seen, ctx.group = scale, seen, group
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        group, seen, gradient = ctx.group, ctx.seen, gradient.float()
        own = (gradient * out.float()).sum(-1)  # [K, G, t]
        for_q = torch.zeros_like(q, dtype=torch.float32)
        for_kv = k.new_zeros(*k.shape[:2], k.shape[2] + v.shape[2], dtype=torch.float32)
        width = k.shape[2]
        for other, keys, values in _around(k, v, group):
            for rows, columns, whole in seen.tiles(group.rank, other):
                scores = _scores(q, keys, rows, columns, ctx.scale)
                if not whole:
                    scores.masked_fill_(seen.hidden(group.rank, other, rows, columns, q.device), LEAST * 2)
                scores.sub_(sums[:, :, rows, None]).exp_()  # now shares of the softmax
                there = gradient[:, :, rows]
                for_kv[:, columns, width:] += scores.flatten(1, 2).mT @ there.flatten(1, 2)
                change = (there.flatten(1, 2) @ values[:, columns].float().mT).view_as(scores)
                change = change.sub_(own[:, :, rows, None]).mul_(scores).mul_(ctx.scale).flatten(1, 2)
                for_q[:, :, rows] += (change @ keys[:, columns].float()).view(*there.shape[:3], width)
                for_kv[:, columns, :width] += change.mT @ q[:, :, rows].flatten(1, 2).float()
            for_kv = _Passing(for_kv, group).taken()  # to the rank that has these keys and values next, in the end to their own
        return for_q.to(q.dtype), for_kv[..., :width].to(k.dtype), for_kv[..., width:].to(v.dtype), None, None, None


def _scores(q: torch.Tensor, keys: torch.Tensor, rows: slice, columns: slice, scale: float) -> torch.Tensor:
    """float32 [K, G, rows, columns]."""
    part = q[:, :, rows].float()
    return (part.flatten(1, 2) @ keys[:, columns].float().mT).mul_(scale).view(*part.shape[:3], -1)


def _around(k: torch.Tensor, v: torch.Tensor, group: Any) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(rank, its keys, its values) of every rank of the ring, from this one backwards; the next are sent meanwhile."""
    held = torch.cat([k, v], dim=-1)
    for turn in range(group.size):
        passing = _Passing(held, group) if turn < group.size - 1 else None
        yield (group.rank - turn) % group.size, held[..., : k.shape[-1]], held[..., k.shape[-1] :]
        if passing is not None:
            held = passing.taken()


class _Passing:
    """A tensor on its way to the next rank of the ring, and one of the same shape on its way here from the one before."""

    def __init__(self, tensor: torch.Tensor, group: Any):
        self._sent, self._taken = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        following, before = (dist.get_global_rank(group.group, (group.rank + step) % group.size) for step in (1, -1))
        self._moves = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, self._sent, following, group.group), dist.P2POp(dist.irecv, self._taken, before, group.group),
        ])  # fmt: skip

    def taken(self) -> torch.Tensor:
        for move in self._moves:
            move.wait()
        return self._taken
