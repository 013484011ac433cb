"""One optimizer step over this rank's packs: the arithmetic of training, and nothing else.

The loss of a step is `sum over all packs of all ranks of -log p(target)` divided by the supervised tokens of the
whole global batch, which ranks agree on before the first backward. Packing, accumulation and the number of ranks
therefore cannot change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from terrace.data.order.balance import CostModel
from terrace.data.types import PackedExample
from terrace.errors import TerraceError
from terrace.models.batch import DeviceBatch, to_device
from terrace.models.families.registry import family_of_model
from terrace.models.sequence_parallel import SequenceGroup, shard_to_device
from terrace.recipe.schema import Stage
from terrace.train.collectives import gather_objects, gather_rows
from terrace.train.context import WorkerContext
from terrace.train.measure import Meter, take_memory_peak
from terrace.train.out_of_memory import OutOfMemory, memory_explained
from terrace.train.precision import DTYPES
from terrace.train.strategies.interface import Strategy

__all__ = ["BatchCounts", "NonFinite", "OutOfMemory", "StepOutcome", "count_batch", "run_step", "seed_step"]


class NonFinite(TerraceError):
    """A loss or gradient was not finite; the optimizer has not stepped. `step` counts from 1."""

    def __init__(self, message: str, step: int, sample_ids: list[str]) -> None:
        super().__init__(message)
        self.step, self.sample_ids = step, sample_ids


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
    model_flops: float  # forward and backward of the whole batch (train.measure)
    stop: bool  # a rank was told to stop
    damaged_samples: int = 0  # that could not be read, of sources with `on_damage: skip`
    replaced_samples: int = 0  # of them, those in whose place another sample stands


@dataclass(frozen=True)
class StepOutcome:
    """`loss` and `grad_norm` are those of the global batch; `skipped` says that the optimizer did not step."""

    loss: float
    grad_norm: float
    memory_peak_bytes: float | None  # of the fullest rank, since its previous step's backward (train.measure)
    skipped: bool = False


def pack_cost(pack: PackedExample, model: CostModel) -> float:
    """Multiply-adds of a pack's forward pass, as the dealing of packs to ranks estimates them."""
    lengths = np.diff(np.asarray(pack.segment_ends, np.float64), prepend=0.0)
    text = model.per_token * lengths.sum() + model.per_token_pair * (lengths**2).sum()
    return float(text + model.per_row * len(pack.pixels))


def count_batch(
    packs: Sequence[PackedExample], sources: Sequence[str], stop: bool, cost: CostModel, context: WorkerContext,
    meter: Meter | None = None, sequence: SequenceGroup | None = None,
) -> BatchCounts:
    """One collective: every rank's counts, added up. Packs that a group shares are counted by its first rank."""
    if sequence is not None and sequence.rank:
        packs = ()
    own = [
        float(sum(pack.supervised_tokens for pack in packs)),
        float(sum(pack.tokens for pack in packs)),
        float(sum(len(pack.sample_ids) for pack in packs)),
        float(sum(pack.visual_tokens for pack in packs)),
        float(len(packs)),
        sum(pack_cost(pack, cost) for pack in packs),
        float(stop),
        sum(meter.pack_flops(pack) for pack in packs) if meter else 0.0,
        float(sum(len(pack.damaged) for pack in packs)),
        float(sum(pack.replaced for pack in packs)),
        *(float(sum(pack.sources.count(source) for pack in packs)) for source in sources),
    ]
    rows = gather_rows(own, context)
    total = rows.sum(axis=0)
    costs = rows[:: sequence.size if sequence else 1, 5]
    return BatchCounts(
        supervised_tokens=int(total[0]),
        tokens=int(total[1]),
        samples=int(total[2]),
        visual_tokens=int(total[3]),
        packs=int(total[4]),
        samples_per_source={source: int(n) for source, n in zip(sources, total[10:])},
        max_over_mean_cost=float(costs.max() / costs.mean()) if costs.sum() else 1.0,
        model_flops=float(total[7]),
        stop=bool(total[6]),
        damaged_samples=int(total[8]),
        replaced_samples=int(total[9]),
    )


def pack_to_device(
    pack: PackedExample, precision: str, model: Any, context: WorkerContext, sequence: SequenceGroup | None = None
) -> DeviceBatch:
    """A pack on this rank's device: the whole of it, or this rank's part in its group."""
    if sequence is None:
        return to_device(pack, context.device, DTYPES[precision])
    visual_ids = family_of_model(model).visual_ids(model.config)
    return shard_to_device(pack, visual_ids, context.device, DTYPES[precision], sequence)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers drawn in a step depend on (seed, step, rank) alone, so a checkpoint has no random state to
    save."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def run_step(
    strategy: Strategy, packs: Sequence[PackedExample], counts: BatchCounts, learning_rates: list[float], stage: Stage,
    step: int, context: WorkerContext, sequence: SequenceGroup | None = None, doing: Callable[[str], None] = lambda _: None,
) -> StepOutcome:
    """Forward and backward of every pack, clip, optimizer step. `step` counts from 1 (in messages); `doing` hears what
    comes next.

    Raises NonFinite before the optimizer steps; under fp16 a gradient overflow instead skips the step on every rank.
    """
    scale = 1.0 / max(1, counts.supervised_tokens)
    config, losses = strategy.model.config, []
    for number, pack in enumerate(packs):
        doing(f"in forward and backward of pack {pack.pack} of")
        with memory_explained("forward and backward", step, stage, config, context, pack):
            batch = pack_to_device(pack, stage.precision, strategy.model, context, sequence)
            losses.append(strategy.accumulate(batch, scale, last=number == len(packs) - 1))
    doing("waiting for the losses of all ranks of")
    values = torch.stack(losses).double().cpu().numpy()
    bad = ~np.isfinite(values)
    own = [float(values[~bad].sum()), float(bad.sum()), float(take_memory_peak(context.device))]
    rows = gather_rows(own, context)
    peak = float(rows[:, 2].max())
    if rows[:, 1].sum():
        ids = [pack.sample_ids for pack, wrong in zip(packs, bad) if wrong]
        strategy.discard()
        raise _nonfinite("loss", ids, step, context)
    doing("in clipping and the optimizer of")
    with memory_explained("the optimizer step", step, stage, config, context):
        norm = strategy.clip(stage.optimizer.clip)
        loss = float(rows[:, 0].sum()) * scale
        if not math.isfinite(norm):
            strategy.discard()
            if strategy.loss_scale is not None and strategy.loss_scale.value > 1.0:
                strategy.loss_scale.after_overflow()
                return StepOutcome(loss, norm, peak, skipped=True)
            raise _nonfinite("gradient", [pack.sample_ids for pack in packs], step, context)
        strategy.step(learning_rates)
    if strategy.loss_scale is not None:
        strategy.loss_scale.after_step()
    return StepOutcome(loss, norm, peak)


def _nonfinite(what: str, own: list[list[str]], step: int, context: WorkerContext) -> NonFinite:
    per_rank = gather_objects([sample for pack in own for sample in pack], context)
    ids = list(dict.fromkeys(sample for rank in per_rank for sample in rank))  # ranks of a group name the same packs
    where = "; ".join(f"rank {rank}: {', '.join(names[:16])}" for rank, names in enumerate(per_rank) if names)
    more = f" and others, {len(ids)} in all" if any(len(names) > 16 for names in per_rank) else ""
    message = f"step {step}: the {what} is not finite, the weights are unchanged. Samples: {where}{more}"
    return NonFinite(message, step, ids)
