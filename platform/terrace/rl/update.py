"""What an update of the policy tells beside its loss: how far engine and trainer are apart, clipping, KL, entropy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from terrace.generation.interface import Response
from terrace.rl.units import TrainGroup
from terrace.worker.collectives import gather_objects
from terrace.worker.context import WorkerContext


@dataclass(frozen=True)
class UpdateOutcome:
    """Means over the response tokens of the global batch: `fields` of metrics.jsonl, and entropy per task."""

    fields: dict[str, float]  # logprob_mismatch_*: |log-probability of the engine - of the trainer|, where there is one of both
    entropy: dict[str, float]


class UpdateFigures:
    """Sums over a step's packs that become metrics."""

    def __init__(self, version: int = -1) -> None:
        """`version` of the weights that train: only what they sampled alone is compared."""
        self._version = version
        self._started = time.perf_counter()
        self._sums = {"mismatch": 0.0, "compared": 0.0, "clipped": 0.0, "kl": 0.0, "tokens": 0.0, "importance": 0.0, "held": 0.0}
        self._largest = 0.0
        self._entropy: dict[str, list[float]] = {}

    def add(self, pack: Sequence[TrainGroup], results: dict[str, torch.Tensor]) -> None:
        """After a pack's backward; `results` are those that its loss left."""
        if not results:
            return
        responses = [(group.prompt.task, response) for group in pack for response in group.responses]
        engine = np.concatenate([response.sampled_logprobs for _, response in responses])
        known = ~np.isnan(engine) & np.concatenate([
            np.full(len(one.sampled_tokens), self._sampled_now(one)) for _, one in responses
        ])  # fmt: skip
        difference = np.abs(results["logprobs"].float().cpu().numpy() - engine)[known]
        self._sums["mismatch"] += float(difference.sum())
        self._sums["compared"] += len(difference)
        self._sums["clipped"] += float(results["clipped"])
        self._sums["kl"] += float(results["kl"])
        self._sums["tokens"] += len(engine)
        for name in ("importance", "held"):
            self._sums[name] += float(results.get(name, 0.0))
        self._largest = max(self._largest, float(difference.max(initial=0.0)))
        entropies, start = results["entropies"].float().cpu().numpy(), 0
        for task, response in responses:
            end = start + len(response.sampled_tokens)
            sums = self._entropy.setdefault(task, [0.0, 0.0])
            sums[0] += float(entropies[start:end].sum())
            sums[1] += end - start
            start = end

    def _sampled_now(self, response: Response) -> bool:
        return response.versions is None or bool(np.isin(response.versions, (-1, self._version)).all())

    def outcome(self, context: WorkerContext) -> UpdateOutcome:
        """The same on every rank."""
        ranks = gather_objects((self._sums, self._largest, self._entropy), context)
        total = {key: sum(rank[0][key] for rank in ranks) for key in self._sums}
        tokens = max(total["tokens"], 1.0)
        entropy: dict[str, list[float]] = {}
        for rank in ranks:
            for task, (value, count) in rank[2].items():
                sums = entropy.setdefault(task, [0.0, 0.0])
                sums[0], sums[1] = sums[0] + value, sums[1] + count
        fields = {
            "update_seconds": time.perf_counter() - self._started,
            "logprobs_compared": total["compared"] / tokens,
            "clipped": total["clipped"] / tokens,
            "kl": total["kl"] / tokens,
        }
        if total["importance"] or total["held"]:
            fields |= {"importance_weight": total["importance"] / tokens, "importance_held": total["held"] / tokens}
        if total["compared"]:
            fields["logprob_mismatch_mean"] = total["mismatch"] / total["compared"]
            fields["logprob_mismatch_max"] = max(rank[1] for rank in ranks)
        return UpdateOutcome(fields, {task: value / count for task, (value, count) in entropy.items()})
