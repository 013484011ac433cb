"""One optimizer step over this rank's packs: the arithmetic of training, and nothing else.

The loss of a step is `sum over all packs of all ranks of -log p(target)` divided by the supervised tokens of the
whole global batch, which ranks agree on before the first backward. Packing, accumulation and the number of ranks
therefore cannot change it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from terrace.data.balance import CostModel
from terrace.data.types import PackedExample
from terrace.errors import TerraceError
from terrace.models.batch import to_device
from terrace.train.collectives import gather_objects, gather_rows
from terrace.train.context import WorkerContext
from terrace.train.precision import DTYPES
from terrace.train.strategies.interface import Strategy


class NonFinite(TerraceError):
    """A loss or gradient was not finite; the optimizer has not stepped. `step` counts from 1."""

    def __init__(self, message: str, step: int, sample_ids: list[str]) -> None:
        super().__init__(message)
        self.step, self.sample_ids = step, sample_ids


class OutOfMemory(TerraceError):
    """The device ran out of memory on a pack."""


@dataclass(frozen=True)
class BatchCounts:
    """What a global batch holds, the same on every rank."""

    supervised_tokens: int
    tokens: int
    samples: int
    visual_tokens: int
    packs: int
    samples_per_source: dict[str, int]
    max_over_mean_cost: float  # of the ranks' attention and matrix work, from lengths alone
    stop: bool  # a rank was told to stop


@dataclass(frozen=True)
class StepOutcome:
    """`loss` and `grad_norm` are those of the global batch; `skipped` says that the optimizer did not step."""

    loss: float
    grad_norm: float
    seconds: float
    skipped: bool = False


def pack_cost(pack: PackedExample, model: CostModel) -> float:
    """Multiply-adds of a pack's forward pass, as the dealing of packs to ranks estimates them."""
    lengths = np.diff(np.asarray(pack.segment_ends, np.float64), prepend=0.0)
    text = model.per_token * lengths.sum() + model.per_token_pair * (lengths**2).sum()
    return float(text + model.per_patch * len(pack.patches))


def count_batch(
    packs: Sequence[PackedExample], sources: Sequence[str], stop: bool, cost: CostModel, context: WorkerContext
) -> BatchCounts:
    """One collective: every rank's counts, added up."""
    own = [
        float(sum(pack.supervised_tokens for pack in packs)),
        float(sum(pack.tokens for pack in packs)),
        float(sum(len(pack.sample_ids) for pack in packs)),
        float(sum(int(pack.image_grids.prod(axis=1).sum()) // 4 for pack in packs if len(pack.image_grids))),
        float(len(packs)),
        sum(pack_cost(pack, cost) for pack in packs),
        float(stop),
        *(float(sum(pack.sources.count(source) for pack in packs)) for source in sources),
    ]
    rows = gather_rows(own, context)
    total = rows.sum(axis=0)
    costs = rows[:, 5]
    return BatchCounts(
        supervised_tokens=int(total[0]),
        tokens=int(total[1]),
        samples=int(total[2]),
        visual_tokens=int(total[3]),
        packs=int(total[4]),
        samples_per_source={source: int(n) for source, n in zip(sources, total[7:])},
        max_over_mean_cost=float(costs.max() / costs.mean()) if costs.sum() else 1.0,
        stop=bool(total[6]),
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers drawn in a step depend on (seed, step, rank) alone, so a checkpoint has no random state to
    save."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def run_step(
    strategy: Strategy, packs: Sequence[PackedExample], counts: BatchCounts, learning_rates: list[float],
    clip: float | None, step: int, precision: str, context: WorkerContext,
) -> StepOutcome:
    """Forward and backward of every pack, clip, optimizer step. `step` counts from 1 (in messages).

    Raises NonFinite before the optimizer steps; under fp16 a gradient overflow instead skips the step on every rank.
    """
    started = time.perf_counter()
    scale = 1.0 / max(1, counts.supervised_tokens)
    losses = []
    for number, pack in enumerate(packs):
        try:
            batch = to_device(pack, context.device, DTYPES[precision])
            losses.append(strategy.accumulate(batch, scale, last=number == len(packs) - 1))
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemory(_memory_advice(pack, step, context)) from error
    values = torch.stack(losses).double().cpu().numpy()
    bad = ~np.isfinite(values)
    rows = gather_rows([float(values[~bad].sum()), float(bad.sum())], context)
    if rows[:, 1].sum():
        ids = [pack.sample_ids for pack, wrong in zip(packs, bad) if wrong]
        strategy.discard()
        raise _nonfinite("loss", ids, step, context)
    norm = strategy.clip(clip)
    loss = float(rows[:, 0].sum()) * scale
    if not math.isfinite(norm):
        strategy.discard()
        if strategy.loss_scale is not None and strategy.loss_scale.value > 1.0:
            strategy.loss_scale.after_overflow()
            return StepOutcome(loss, norm, time.perf_counter() - started, skipped=True)
        raise _nonfinite("gradient", [pack.sample_ids for pack in packs], step, context)
    strategy.step(learning_rates)
    if strategy.loss_scale is not None:
        strategy.loss_scale.after_step()
    return StepOutcome(loss, norm, time.perf_counter() - started)


def _nonfinite(what: str, own: list[list[str]], step: int, context: WorkerContext) -> NonFinite:
    per_rank = gather_objects([sample for pack in own for sample in pack], context)
    ids = [sample for rank in per_rank for sample in rank]
    where = "; ".join(f"rank {rank}: {', '.join(names[:16])}" for rank, names in enumerate(per_rank) if names)
    more = f" and others, {len(ids)} in all" if any(len(names) > 16 for names in per_rank) else ""
    message = f"step {step}: the {what} is not finite, the weights are unchanged. Samples: {where}{more}"
    return NonFinite(message, step, ids)


def _memory_advice(pack: PackedExample, step: int, context: WorkerContext) -> str:
    longest = max((int(n) for n in np.diff(pack.segment_ends, prepend=0)), default=0)
    return (
        f"rank {context.rank}, step {step}: out of device memory on pack {pack.pack} ({pack.tokens} tokens in "
        f"{len(pack.sample_ids)} samples, the longest {longest}; {len(pack.patches)} patches in "
        f"{len(pack.image_grids)} images). Set activation_checkpointing for the parts that train, lower "
        "sequence_length, pixels.max or loss_chunk_tokens, or choose parallel.strategy fsdp or zero3"
    )
