"""Sequence parallelism: a group of ranks shares one pack, so that a long one fits.

Each rank embeds, normalises and multiplies its own run of the pack's tokens. Attention goes one of two ways. `heads` (Ulysses): one
all-to-all turns "my tokens, all heads" into "all tokens, my heads", the usual kernel runs over the whole pack's segments, and another
turns it back; heads bound the number of ranks. `ring`: keys and values travel around the group (models.ring_attention).

Images are split over the group, whole images in order; their features are gathered, and each rank
keeps those of its own tokens. Activations and logits per rank shrink by the size of the group; weights do not.

The loss of a rank is that of its tokens, so the sum over ranks is the pack's, and gradients of weights add up as they
do over data-parallel ranks: strategies need not know of it. Every rank issues the same collectives whatever its
tokens hold: the pack is padded to a multiple of the group with tokens of a segment of their own, and a rank without
an image runs the blank one.

Cost of `heads` per layer and token: 2 (heads + key/value heads) x head size numbers sent, forward, and as many backward.
Shape letters: S ranks of the group, T tokens of the padded pack, t = T / S, H heads, K key/value heads, D head size.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from terrace.data.types import PackedExample
from terrace.errors import InputError
from terrace.families.configurations import language_config
from terrace.models.attention import give_language_attention, registered_name
from terrace.models.batch import MOST_POSITION_ROWS, DeviceBatch, to_device
from terrace.models.families.interface import Features
from terrace.models.ring_attention import ring_attention

NAME = "terrace_flash_ulysses"  # "flash" as in models.attention: transformers then builds no mask
RING_NAME = "terrace_flash_ring"


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a pack; `rank` is this one's place among them."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True)
class SequenceShard:
    """What a rank must know of the pack beyond its own tokens. Visual tokens are counted in token order."""

    group: SequenceGroup
    visual_before: int  # visual tokens of the pack before this rank's tokens
    visual_own: int  # among this rank's tokens
    visual_computed: tuple[int, ...]  # per rank: those whose features it computes

    def own_features(self, embeddings: torch.Tensor, features: Features) -> tuple[torch.Tensor, Features, bool]:
        """This rank's embeddings [1, t, hidden], the features of its own tokens, and whether the pack has any.

        `features` are those of the images that this rank computed, or of the blank one.
        """
        # Empty slices: no number changes, but every rank's graph holds the tower and the gathering, as collectives need.
        for tensor in (features.pooled, *features.deep):
            embeddings = embeddings + tensor[:0].sum().to(embeddings.dtype)
        if not sum(self.visual_computed):
            return embeddings, features, False
        gathered = features.map(
            lambda tensor: _GatherRows.apply(tensor[: self.visual_computed[self.group.rank]], self.visual_computed, self.group)
        )
        for tensor in (gathered.pooled, *gathered.deep):
            embeddings = embeddings + tensor[:0].sum().to(embeddings.dtype)
        return embeddings, gathered.map(lambda tensor: tensor[self.visual_before : self.visual_before + self.visual_own]), True


def open_sequence_group(size: int, rank: int, world_size: int) -> SequenceGroup | None:
    """Groups of `size` neighbouring ranks; None for size 1. Collective: all ranks call it.

    Raises InputError if the ranks do not form such groups.
    """
    if size == 1:
        return None
    if world_size % size:
        raise InputError(f"{world_size} workers do not form groups of parallel.sequence_parallel {size}")
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size, size)]
    return SequenceGroup(groups[rank // size], rank % size, size)


def check_heads(text_config: Any, size: int) -> None:
    """Raise InputError if the heads of the language model cannot be dealt to `size` ranks."""
    heads, key_heads = text_config.num_attention_heads, getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    if heads % size or (key_heads % size and size % key_heads):
        raise InputError(
            f"parallel.sequence_parallel {size}: {heads} attention heads and {key_heads} key/value heads cannot be dealt "
            f"evenly to {size} ranks; choose a number that divides {heads}, and divides {key_heads} or is a multiple of it, or "
            "parallel.sequence_exchange: ring, which deals no heads"
        )


def use_sequence_parallel(model: Any, backend: str, size: int, exchange: str = "heads") -> None:
    """Give the language layers this attention around `backend`, which goes on serving the vision tower."""
    if exchange == "heads":
        check_heads(language_config(model.config), size)
    give_language_attention(model, NAME if exchange == "heads" else RING_NAME, backend)


# ---------------------------------------------------------------- the pack


def padded_length(tokens: int, size: int) -> int:
    """Tokens of a pack with the padding that makes it divisible; at least one per rank."""
    return max(1, -(-tokens // size)) * size


def image_shares(rows: list[int], size: int) -> list[int]:
    """Where to cut the images of a pack: rank r computes images [cuts[r], cuts[r + 1]), about equal in rows of pixels."""
    ends = np.cumsum([0, *rows])
    cuts = [int(np.abs(ends - ends[-1] * place / size).argmin()) for place in range(size + 1)]
    return [0, *cuts[1:-1], len(rows)]


def own_images(example: PackedExample, first: int, last: int) -> dict[str, np.ndarray]:
    """The image fields of images [first, last) of a pack."""
    start, end = (int(example.image_rows[:place].sum()) for place in (first, last))
    fields = {name: getattr(example, name)[first:last] for name in ("image_facts", "image_tokens", "image_rows")}
    return {"pixels": example.pixels[start:end], **fields}


def shard_to_device(
    example: PackedExample, visual_ids: tuple[int, ...], device: torch.device | str, dtype: torch.dtype,
    group: SequenceGroup,
) -> DeviceBatch:
    """This rank's part of a pack, on the device. `visual_ids` are the ids of placeholders."""
    length = padded_length(example.tokens, group.size)
    spare = length - example.tokens
    own = slice(group.rank * length // group.size, (group.rank + 1) * length // group.size)
    ids = np.pad(example.input_ids, (0, spare))
    if spare:  # an id that is no image token
        ids[-spare:] = next(number for number in range(len(visual_ids) + 1) if number not in visual_ids)
    visual = np.isin(ids, visual_ids)
    positions = example.position_ids if example.tokens else np.zeros((MOST_POSITION_ROWS, 0), np.int32)
    cuts = image_shares(example.image_rows.tolist(), group.size)
    local = dataclasses.replace(
        example, input_ids=ids[own], targets=np.pad(example.targets, (0, spare), constant_values=-100)[own],
        position_ids=np.pad(positions, ((0, 0), (0, spare)))[:, own],
        segment_ends=np.asarray([length // group.size], np.int32),
        **own_images(example, cuts[group.rank], cuts[group.rank + 1]),
    )  # fmt: skip
    batch = to_device(local, device, dtype)
    boundaries = [0, *(int(end) for end in example.segment_ends), *([length] if spare else [])]
    shard = SequenceShard(
        group=group,
        visual_before=int(visual[: own.start].sum()),
        visual_own=int(visual[own].sum()),
        visual_computed=tuple(int(example.image_tokens[first:last].sum()) for first, last in itertools.pairwise(cuts)),
    )
    return dataclasses.replace(
        batch, example=example, boundaries=boundaries, longest=int(np.diff(boundaries).max()), sequence=shard,
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32).to(batch.device, non_blocking=True),
    )  # fmt: skip


# ---------------------------------------------------------------- collectives with gradients


class _AllToAll(torch.autograd.Function):
    """[S, ...] -> [S, ...]: block r goes to rank r, and what comes from rank r is block r."""

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        ctx.group = group
        blocks = blocks.contiguous()
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=group.group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(gradient, ctx.group), None


class _GatherRows(torch.autograd.Function):
    """[counts[rank], H] -> [sum of counts, H], in the order of ranks; gradients of a row are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: tuple[int, ...], group: SequenceGroup) -> torch.Tensor:
        ctx.counts, ctx.group = counts, group
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        gathered = padded.new_empty(group.size * max(counts), rows.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=group.group)
        blocks = gathered.unflatten(0, (group.size, max(counts)))
        return torch.cat([block[:count] for block, count in zip(blocks, counts)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        counts, group = ctx.counts, ctx.group
        blocks = gradient.new_zeros(group.size, max(counts), gradient.shape[1], dtype=torch.float32)
        for block, part in zip(blocks, gradient.split(counts)):
            block[: len(part)] = part
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=group.group)
        return received.sum(dim=0)[: counts[group.rank]].to(gradient.dtype), None, None


# ---------------------------------------------------------------- in the model


def gather_tokens(tensors: list[torch.Tensor], group: SequenceGroup) -> list[torch.Tensor]:
    """Each [1, h, t, D] -> [1, h / S, T, D], in one all-to-all. Fewer than S heads are repeated first."""
    size, blocks = group.size, []
    for tensor in tensors:
        if tensor.shape[1] < size:
            tensor = tensor.repeat_interleave(size // tensor.shape[1], dim=1)
        blocks.append(tensor[0].unflatten(0, (size, tensor.shape[1] // size)))  # [S, h / S, t, D]
    received = _AllToAll.apply(torch.cat(blocks, dim=1), group)
    parts = received.split([block.shape[1] for block in blocks], dim=1)
    return [part.transpose(0, 1).flatten(1, 2).unsqueeze(0) for part in parts]


def scatter_tokens(out: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """[1, T, H / S, D] -> [1, t, H, D]."""
    blocks = out[0].unflatten(0, (group.size, out.shape[1] // group.size))  # [S, t, H / S, D]
    return _AllToAll.apply(blocks, group).transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, sequence_group: SequenceGroup | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls with this rank's tokens; q [1, H, t, D], k and v [1, K, t, D] -> ([1, t, H, D], None)."""
    plain = ALL_ATTENTION_FUNCTIONS[registered_name(module.plain_backend)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sequence_group is None:
        return plain(module, query, key, value, attention_mask, scaling=scale, **rest)
    if value.dtype != query.dtype:  # rotary embedding in fp32 under autocast
        query, key = query.to(value.dtype), key.to(value.dtype)
    width = value.shape[-1]
    if width != query.shape[-1]:  # latent attention has narrower values; what is sent has one width
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
    q, k, v = gather_tokens([query, key, value], sequence_group)
    out, _ = plain(module, q, k, v, attention_mask, scaling=scale, **rest)
    return scatter_tokens(out[..., :width], sequence_group), None


def _ring(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, sequence_group: SequenceGroup | None = None,
    segment_boundaries: list[int] | None = None, bidirectional_groups: torch.Tensor | None = None,
    sliding_window: int | None = None, softcap: float | None = None, dropout: float = 0.0, **rest: Any,
) -> tuple[torch.Tensor, None]:
    """The same by ring attention, which is causal and knows windows; groups of tokens that see each other it does not."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sequence_group is None:
        plain = ALL_ATTENTION_FUNCTIONS[registered_name(module.plain_backend)]
        return plain(
            module, query, key, value, attention_mask, scaling=scale, segment_boundaries=segment_boundaries, dropout=dropout,
            bidirectional_groups=bidirectional_groups, sliding_window=sliding_window, softcap=softcap, **rest,
        )  # fmt: skip
    if attention_mask is not None or dropout or softcap is not None or bidirectional_groups is not None or segment_boundaries is None:
        raise InputError(
            "parallel.sequence_exchange: ring attends causally within segments, without mask, dropout, cap or tokens that see later "
            "ones, which this model has; use sequence_exchange: heads"
        )
    if value.dtype != query.dtype:  # rotary embedding in fp32 under autocast
        query, key = query.to(value.dtype), key.to(value.dtype)
    return ring_attention(query, key, value, segment_boundaries, scale, sliding_window, sequence_group), None


AttentionInterface.register(NAME, _attention)
AttentionInterface.register(RING_NAME, _ring)
