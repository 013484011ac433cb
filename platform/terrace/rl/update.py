"""The second half of an iteration: the policy step over this rank's groups, through the training strategy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from terrace.objectives.grpo import PolicyOptions, summed_policy_loss
from terrace.rl.units import TrainGroup, pack_groups, policy_batch
from terrace.train.collectives import gather_objects, gather_rows
from terrace.train.context import WorkerContext
from terrace.train.precision import DTYPES, compute_context
from terrace.train.step import NonFinite
from terrace.train.strategies.interface import Strategy


@dataclass(frozen=True)
class UpdateOutcome:
    """One optimizer step. Means are over the response tokens of the global batch."""

    loss: float
    grad_norm: float
    seconds: float
    skipped: bool
    packs: int
    rows: int
    mismatch_mean: float  # |log-probability of the engine - of the trainer|
    mismatch_max: float
    clipped: float
    kl: float
    entropy: dict[str, float]  # per task


class PolicyStepper:
    """Turns groups into optimizer steps. All ranks call `step` the same number of times."""

    def __init__(
        self,
        strategy: Strategy,
        options: PolicyOptions,
        sequence_length: int,
        precision: str,
        clip: float | None,
        context: WorkerContext,
        reference: Any | None = None,
    ) -> None:
        self._strategy, self._options, self._length, self._precision = strategy, options, sequence_length, precision
        self._clip, self._context, self._reference = clip, context, reference

    def packs(self, groups: Sequence[TrainGroup]) -> list[list[TrainGroup]]:
        """This rank's packs, filled up with empty ones to the most that any rank has."""
        packs = pack_groups(groups, self._length)
        most = int(gather_rows([float(len(packs))], self._context).max())
        return packs + [[] for _ in range(max(most, 1) - len(packs))]

    def logprobs(self, packs: Sequence[Sequence[TrainGroup]], doing: Callable[[str], None]) -> list[torch.Tensor]:
        """Log-probabilities of every pack's tokens under the current weights (before the first of several updates)."""
        made = []
        for pack in packs:
            batch = self._batch(pack)
            doing("computing log-probabilities of")
            self._strategy.loss(batch)
            made.append(batch.results.get("logprobs", torch.zeros(0)).cpu())
        return made

    def step(
        self,
        packs: Sequence[Sequence[TrainGroup]],
        total_tokens: int,
        rates: list[float],
        number: int,
        old: Sequence[torch.Tensor] | None,
        doing: Callable[[str], None],
    ) -> UpdateOutcome:
        """One optimizer step over all ranks' packs. Raises NonFinite before it; `number` counts steps from 1."""
        started = time.perf_counter()
        scale = 1.0 / max(1, total_tokens)
        losses, figures = [], _Figures()
        for place, pack in enumerate(packs):
            batch = self._batch(pack)
            if old is not None:
                batch.old_logprobs = old[place].to(batch.tokens.device)
            if self._reference is not None:
                batch.reference_logprobs = self._reference_logprobs(pack)
            doing("running a pack of")
            losses.append(self._strategy.accumulate(batch, scale, last=place == len(packs) - 1))
            figures.add(pack, batch.results)
        values = torch.stack(losses).double().cpu().numpy()
        bad = ~np.isfinite(values)
        doing("updating the weights of")
        rows = gather_rows([float(values[~bad].sum()), float(bad.sum())], self._context)
        names = [group.prompt.id for pack, wrong in zip(packs, bad) if wrong for group in pack]
        if rows[:, 1].sum():
            self._strategy.discard()
            raise _nonfinite("policy loss", names, number, self._context)
        norm, skipped = self._strategy.clip(self._clip), False
        if not math.isfinite(norm):
            self._strategy.discard()
            scaler = self._strategy.loss_scale
            if scaler is None or scaler.value <= 1.0:
                raise _nonfinite("gradient", [g.prompt.id for pack in packs for g in pack], number, self._context)
            scaler.after_overflow()
            skipped = True
        else:
            self._strategy.step(rates)
            if self._strategy.loss_scale is not None:
                self._strategy.loss_scale.after_step()
        return figures.outcome(float(rows[:, 0].sum()) * scale, norm, skipped, started, packs, self._context)

    def _batch(self, pack: Sequence[TrainGroup]) -> Any:
        return policy_batch(pack, self._context.device, DTYPES[self._precision])

    def _reference_logprobs(self, pack: Sequence[TrainGroup]) -> torch.Tensor:
        batch = self._batch(pack)
        with torch.no_grad(), compute_context(self._precision, self._context.device):
            summed_policy_loss(self._reference, batch, self._options)
        return batch.results.get("logprobs", torch.zeros(0, device=self._context.device))


class _Figures:
    """Sums over a step's packs that become metrics."""

    def __init__(self) -> None:
        self._sums = {"mismatch": 0.0, "clipped": 0.0, "kl": 0.0, "tokens": 0.0}
        self._largest = 0.0
        self._entropy: dict[str, list[float]] = {}

    def add(self, pack: Sequence[TrainGroup], results: dict[str, torch.Tensor]) -> None:
        if not results:
            return
        responses = [(group.prompt.task, response) for group in pack for response in group.responses]
        engine = np.concatenate([response.logprobs for _, response in responses])
        difference = np.abs(results["logprobs"].float().cpu().numpy() - engine)
        self._sums["mismatch"] += float(difference.sum())
        self._sums["clipped"] += float(results["clipped"])
        self._sums["kl"] += float(results["kl"])
        self._sums["tokens"] += len(engine)
        self._largest = max(self._largest, float(difference.max()))
        entropies, start = results["entropies"].float().cpu().numpy(), 0
        for task, response in responses:
            end = start + len(response.tokens)
            sums = self._entropy.setdefault(task, [0.0, 0.0])
            sums[0] += float(entropies[start:end].sum())
            sums[1] += end - start
            start = end

    def outcome(
        self,
        loss: float,
        norm: float,
        skipped: bool,
        started: float,
        packs: Sequence[Sequence[TrainGroup]],
        context: WorkerContext,
    ) -> UpdateOutcome:
        """The same on every rank."""
        own = (
            self._sums,
            self._largest,
            self._entropy,
            len(packs),
            sum(group.rows for pack in packs for group in pack),
        )
        ranks = gather_objects(own, context)
        total = {key: sum(rank[0][key] for rank in ranks) for key in self._sums}
        tokens = max(total["tokens"], 1.0)
        entropy: dict[str, list[float]] = {}
        for rank in ranks:
            for task, (value, count) in rank[2].items():
                sums = entropy.setdefault(task, [0.0, 0.0])
                sums[0], sums[1] = sums[0] + value, sums[1] + count
        return UpdateOutcome(
            loss=loss,
            grad_norm=norm,
            seconds=time.perf_counter() - started,
            skipped=skipped,
            packs=sum(rank[3] for rank in ranks),
            rows=sum(rank[4] for rank in ranks),
            mismatch_mean=total["mismatch"] / tokens,
            mismatch_max=max(rank[1] for rank in ranks),
            clipped=total["clipped"] / tokens,
            kl=total["kl"] / tokens,
            entropy={task: value / count for task, (value, count) in entropy.items()},
        )


def _nonfinite(what: str, own: list[str], number: int, context: WorkerContext) -> NonFinite:
    ids = [name for rank in gather_objects(own, context) for name in rank]
    return NonFinite(
        f"step {number}: the {what} is not finite, the weights are unchanged. Prompts: {', '.join(ids[:16])}",
        number,
        ids,
    )
