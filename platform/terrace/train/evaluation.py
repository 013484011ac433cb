"""Held-out loss per kind of sample, as a mean over supervised tokens; the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from terrace.data.types import PATCH_VALUES, PackedExample
from terrace.models.batch import to_device
from terrace.train.collectives import gather_rows
from terrace.train.context import WorkerContext
from terrace.train.precision import DTYPES
from terrace.train.strategies.interface import Strategy


def empty_pack(pack: int = -1, sequence_length: int = 1) -> PackedExample:
    """A pack without tokens: it counts nothing and runs the same collectives as any other."""
    return PackedExample(
        pack=pack,
        input_ids=np.zeros(0, np.int32),
        targets=np.zeros(0, np.int32),
        position_ids=np.zeros((4, 0), np.int32),
        segment_ends=np.zeros(0, np.int32),
        patches=np.zeros((0, PATCH_VALUES), np.uint8),
        image_grids=np.zeros((0, 3), np.int32),
        sample_ids=[],
        sources=[],
        kinds=[],
        sequence_length=sequence_length,
    )


def held_out_loss(
    strategy: Strategy, packs: Mapping[str, Sequence[PackedExample]], precision: str, context: WorkerContext
) -> dict[str, float]:
    """Mean loss per supervised token of each kind. `packs` is the same on every rank; each evaluates its share."""
    strategy.model.eval()
    losses = {}
    for kind in sorted(packs):
        loss_sum, tokens = 0.0, 0
        rounds = -(-len(packs[kind]) // context.world_size)
        for turn in range(rounds):
            place = turn * context.world_size + context.rank
            pack = packs[kind][place] if place < len(packs[kind]) else empty_pack()
            loss_sum += float(strategy.loss(to_device(pack, context.device, DTYPES[precision])))
            tokens += pack.supervised_tokens
        total = gather_rows([loss_sum, float(tokens)], context).sum(axis=0)
        if total[1]:
            losses[kind] = float(total[0] / total[1])
    strategy.model.train()
    return losses
