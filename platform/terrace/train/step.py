"""One optimizer step over this rank's examples: the arithmetic of training, and nothing else.

The loss of a step is the sum of the losses of all examples of all ranks, divided by the sum of their weights, which ranks
agree on before the first backward. Packing, accumulation and the number of ranks therefore cannot change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from terrace.errors import TerraceError
from terrace.models.sequence_parallel import SequenceGroup
from terrace.objectives.interface import Counts, Objective, StepExamples
from terrace.recipe.schema import Stage
from terrace.train.measure import Meter, take_memory_peak
from terrace.train.optimizer import Rate
from terrace.train.out_of_memory import OutOfMemory, memory_explained
from terrace.train.strategies.interface import Strategy
from terrace.worker.collectives import gather_objects, gather_rows
from terrace.worker.context import WorkerContext

__all__ = ["BatchCounts", "NonFinite", "OutOfMemory", "StepOutcome", "count_batch", "run_step", "seed_step"]


class NonFinite(TerraceError):
    """A loss or gradient was not finite; the optimizer has not stepped. `step` counts from 1."""

    def __init__(self, message: str, step: int, sample_ids: list[str]) -> None:
        super().__init__(message)
        self.step, self.sample_ids = step, sample_ids


@dataclass(frozen=True)
class BatchCounts:
    """What a global batch holds, the same on every rank."""

    divisor: float  # of the loss: the weights of all examples
    supervised_tokens: int
    tokens: int
    samples: int
    visual_tokens: int
    rows: int  # of the packs that are filled
    packs: int  # of all ranks
    packs_of_a_rank: int  # the most that any has
    samples_per_source: dict[str, int]
    max_over_mean_cost: float  # of the ranks' attention and matrix work, from lengths alone
    model_flops: float  # forward and backward of the whole batch (train.measure)
    stop: bool  # a rank was told to stop
    damaged_samples: int = 0  # that could not be read, of sources with `on_damage: skip`
    replaced_samples: int = 0  # of them, those in whose place another sample stands


@dataclass(frozen=True)
class StepOutcome:
    """`loss` and `grad_norm` are those of the global batch; `skipped` says that the optimizer did not step, and `reason` why."""

    loss: float
    grad_norm: float
    memory_peak_bytes: float | None  # of the fullest rank, since its previous step's backward (train.measure)
    skipped: bool = False
    reason: str = ""
    gradient_noise: dict[str, float] = field(default_factory=dict)  # `noise_scale`


def nothing_done(reason: str) -> StepOutcome:
    """The outcome of a step that ended before its optimizer step, or was left out."""
    return StepOutcome(math.nan, math.nan, None, skipped=True, reason=reason)


def count_batch(
    objective: Objective, taken: StepExamples, sources: Sequence[str], stop: bool, context: WorkerContext,
    meter: Meter | None = None, sequence: SequenceGroup | None = None,
) -> BatchCounts:
    """One collective: every rank's counts, added up. Packs that a group shares are counted by its first rank."""
    shared = sequence is not None and sequence.rank > 0
    examples = [] if shared else taken.examples
    own = Counts() if shared else objective.count(taken)
    flops = sum(_flops(objective, example, meter) for example in examples) if meter and objective.measured else 0.0
    row = [
        float(sum(objective.weight(example) for example in examples)), own.supervised_tokens, own.tokens, own.samples,
        own.visual_tokens, own.rows, own.cost, float(stop), flops, own.damaged_samples, own.replaced_samples,
        *(own.samples_per_source.get(source, math.nan) for source in sources),
    ]  # fmt: skip
    rows = gather_rows([float(len(taken.examples)), *map(float, row)], context)
    most = max(int(rows[:, 0].max()), 1)
    total = rows[:, :12].sum(axis=0)
    per_source = rows[:, 12:]
    size = sequence.size if sequence else 1
    costs = rows[::size, 7]
    return BatchCounts(
        divisor=float(total[1]),
        supervised_tokens=int(total[2]),
        tokens=int(total[3]),
        samples=int(total[4]),
        visual_tokens=int(total[5]),
        rows=int(total[6]),
        packs=most * (context.world_size // size),
        packs_of_a_rank=most,
        samples_per_source={
            source: int(np.nansum(column)) for source, column in zip(sources, per_source.T) if not np.isnan(column).all()
        },
        max_over_mean_cost=float(costs.max() / costs.mean()) if costs.sum() else 1.0,
        model_flops=float(total[9]),
        stop=bool(total[8]),
        damaged_samples=int(total[10]),
        replaced_samples=int(total[11]),
    )


def _flops(objective: Objective, example: Any, meter: Meter) -> float:
    pack = objective.pack_of(example)
    return meter.pack_flops(pack) if pack is not None else 0.0


def filled_up(objective: Objective, examples: Sequence[Any], counts: BatchCounts) -> list[Any]:
    """This rank's examples and empty ones, as many as any rank has: ranks run the same collectives."""
    missing = counts.packs_of_a_rank - len(examples)
    if missing and objective.coupled:
        raise TerraceError(
            f"this rank holds {len(examples)} examples of a step and another {counts.packs_of_a_rank}: under an objective whose "
            "examples meet, batch.packs must be a multiple of the workers"
        )
    return [*examples, *(objective.empty() for _ in range(missing))]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers drawn in a step depend on (seed, step, rank) alone, so a checkpoint has no random state to save."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def run_step(
    strategy: Strategy, objective: Objective, examples: Sequence[Any], divisor: float, rates: Sequence[Rate], stage: Stage,
    step: int, context: WorkerContext, doing: Callable[[str], None] = lambda _: None,
) -> StepOutcome:
    """Forward and backward of every example, clip, optimizer step. `step` counts from 1 (in messages); `doing` hears what comes next.

    Raises NonFinite before the optimizer steps; under fp16 a gradient overflow instead skips the step on every rank.
    """
    scale = 1.0 / max(1.0, divisor)
    config, losses, small = strategy.model.config, [], (0.0, 0.0)
    objective.before(examples, scale)
    for number, example in enumerate(examples):
        pack = objective.pack_of(example)
        doing(f"in forward and backward of pack {pack.pack if pack is not None else number} of")
        with memory_explained("forward and backward", step, stage, config, context, pack):
            batch = objective.batch(example)
            losses.append(strategy.accumulate(batch, scale, last=number == len(examples) - 1))
        objective.seen(example, batch)
        if stage.gradient_noise and number == 0 and len(examples) > 1 and (weight := float(objective.weight(example))):
            small = (strategy.gradient_square() / (weight * scale) ** 2, 1.0 / weight)  # of this pack's mean gradient
    doing("waiting for the losses of all ranks of")
    values = torch.stack(losses).double().cpu().numpy()
    bad = ~np.isfinite(values)
    own = [float(values[~bad].sum()), float(bad.sum()), float(take_memory_peak(context.device)), *small]
    rows = gather_rows(own, context)
    peak = float(rows[:, 2].max())
    if rows[:, 1].sum():
        ids = [objective.names(example) for example, wrong in zip(examples, bad) if wrong]
        strategy.discard()
        raise _nonfinite("loss", ids, step, context)
    doing("in clipping and the optimizer of")
    with memory_explained("the optimizer step", step, stage, config, context):
        norm = strategy.clip(stage.optimizer.clip)
        loss = objective.mean(float(rows[:, 0].sum()), divisor)
        if not math.isfinite(norm):
            strategy.discard()
            if strategy.loss_scale is not None and strategy.loss_scale.value > 1.0:
                strategy.loss_scale.after_overflow()
                reason = f"fp16 gradients overflowed; the loss scale is {strategy.loss_scale.value:g} now"
                return StepOutcome(loss, norm, peak, skipped=True, reason=reason)
            raise _nonfinite("gradient", [objective.names(example) for example in examples], step, context)
        strategy.step(rates)
    if strategy.loss_scale is not None:
        strategy.loss_scale.after_step()
    small_ones = rows[:, 4] > 0
    noise = noise_scale(rows[small_ones, 3], rows[small_ones, 4], norm**2, divisor) if small_ones.any() else {}
    return StepOutcome(loss, norm, peak, gradient_noise=noise)


def noise_scale(squares: np.ndarray, inverse_sizes: np.ndarray, whole: float, size: float) -> dict[str, float]:
    """tr(covariance of one unit's gradient) / |mean gradient|^2 (McCandlish et al. 2018): about the batch size beyond which more of it
    stops paying, in units of the divisor (supervised tokens of lm), and the estimates of both parts. `squares` are the squared norms of
    small batches' mean gradients, `inverse_sizes` one over their sizes; `whole` and `size` are those of the whole batch, and
    E|G_b|^2 = |G|^2 + tr / b.

    One step's estimate is noisy, and its signal may come out negative (there is no scale then): average the parts over steps."""
    small, inverse = float(squares.mean()), float(inverse_sizes.mean())
    if inverse <= 1 / size:
        return {}
    trace = (small - whole) / (inverse - 1 / size)
    signal = whole - trace / size
    found = {"gradient_noise_trace": trace, "gradient_noise_signal": signal}
    return found | ({"gradient_noise_scale": trace / signal} if signal > 0 else {})


def _nonfinite(what: str, own: list[list[str]], step: int, context: WorkerContext) -> NonFinite:
    per_rank = gather_objects([sample for pack in own for sample in pack], context)
    ids = list(dict.fromkeys(sample for rank in per_rank for sample in rank))  # ranks of a group name the same packs
    where = "; ".join(f"rank {rank}: {', '.join(names[:16])}" for rank, names in enumerate(per_rank) if names)
    more = f" and others, {len(ids)} in all" if any(len(names) > 16 for names in per_rank) else ""
    message = f"step {step}: the {what} is not finite, the weights are unchanged. Samples: {where}{more}"
    return NonFinite(message, step, ids)
