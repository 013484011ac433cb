"""Held-out loss per kind of sample, as a mean over supervised tokens; the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from terrace.data.types import PackedExample, no_pixels
from terrace.models.sequence_parallel import SequenceGroup
from terrace.train.collectives import gather_rows
from terrace.train.context import WorkerContext, data_place
from terrace.train.step import pack_to_device
from terrace.train.strategies.interface import Strategy


def empty_pack(pack: int = -1, sequence_length: int = 1) -> PackedExample:
    """A pack without tokens: it counts nothing and runs the same collectives as any other."""
    return PackedExample(
        pack=pack,
        input_ids=np.zeros(0, np.int32),
        targets=np.zeros(0, np.int32),
        position_ids=np.zeros((0, 0), np.int32),
        segment_ends=np.zeros(0, np.int32),
        **no_pixels(0, 0),
        sample_ids=[],
        sources=[],
        kinds=[],
        sequence_length=sequence_length,
    )


def held_out_loss(
    strategy: Strategy, packs: Mapping[str, Sequence[PackedExample]], precision: str, context: WorkerContext,
    sequence: SequenceGroup | None = None, alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss per supervised token of each kind. `packs` is the same on every rank; each evaluates its share, or with
    sequence parallelism its group's. `alive` is called at every pack."""
    strategy.model.eval()
    group_rank, groups = data_place(context, sequence.size if sequence else 1)
    losses = {}
    for kind in sorted(packs):
        loss_sum, tokens = 0.0, 0
        rounds = -(-len(packs[kind]) // groups)
        for turn in range(rounds):
            place = turn * groups + group_rank
            pack = packs[kind][place] if place < len(packs[kind]) else empty_pack()
            loss_sum += float(strategy.loss(pack_to_device(pack, precision, strategy.model, context, sequence)))
            tokens += pack.supervised_tokens if sequence is None or sequence.rank == 0 else 0
            alive()
        total = gather_rows([loss_sum, float(tokens)], context).sum(axis=0)
        if total[1]:
            losses[kind] = float(total[0] / total[1])
    strategy.model.train()
    return losses
