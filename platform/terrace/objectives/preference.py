"""What dpo, mpo, kto, orpo and simpo share: packs of answers, a reference, figures. Each of them is a file with its own losses.

    loss = sum over pairs (kto: answers) of the objective's losses, divided by those of the global batch
           + sft_weight * mean over the chosen answers' tokens of the global batch of -log p

The reference is the stage's own first weights (objectives.reference). Both means are over the global batch, whatever the
packing, the accumulation and the ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from terrace.data.types import PackedExample
from terrace.models.attention import choose_backend
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.objectives import reference
from terrace.objectives.answers import AnswerBatch, AnswerPack, answer_batch, answer_logprobs, empty_answers
from terrace.objectives.experts import ExpertBalance, open_balance
from terrace.objectives.interface import Counts, Objective, Opening, StageFeed, StageRun, StepExamples
from terrace.objectives.reference import ReferenceTable
from terrace.recipe.identity import stage_hash


@dataclass
class AnswerFeed(StageFeed):
    """`held_out` is a function that reads this rank's held-out packs."""

    rows: Callable[[], list[Any]] = list  # references to every row that the stage may see, each once, held-out ones too
    name: Callable[[Any], str] = str  # of a reference: source, row and sample id
    read: Callable[[Sequence[Any]], list[AnswerPack]] = field(default=lambda rows: [])


@dataclass(frozen=True)
class Scored:
    """Answers with their log-probabilities, float32 [A]."""

    logprobs: torch.Tensor
    reference: torch.Tensor
    tokens: torch.Tensor
    wanted: torch.Tensor  # bool [A]

    @property
    def ratios(self) -> torch.Tensor:
        return self.logprobs - self.reference

    def pairs(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the chosen and of the rejected answers, [N] each."""
        chosen, rejected = values.view(-1, 2).unbind(1)
        return chosen, rejected


FIGURES = ("right", "judged", "margin", "chosen", "chosen_logprob", "chosen_tokens", "rejected", "rejected_logprob", "rejected_tokens")


class Preference(Objective):
    """A subclass says `losses` and, where it differs, what it needs."""

    with_reference = True
    sft_weight = 0.0

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        stage = opening.stage
        # ZeRO-3: every call of the output layer is a collective, so ranks must make equally many.
        self._chunk_tokens = 1 << 30 if stage.parallel.strategy == "zero3" else stage.loss_chunk_tokens
        self._table: ReferenceTable | None = None
        self._sft_factor = 0.0
        self._experts: ExpertBalance | None = None
        self._sums = np.zeros(len(FIGURES))

    # ------------------------------------------------------------ what an objective says

    def losses(self, scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each pair (kto: of each answer), and the reward of each answer, [A], that margins are made of."""
        raise NotImplementedError

    def margins(self, rewards: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Of each pair: by how much the chosen answer's reward is higher."""
        chosen, rejected = rewards.view(-1, 2).unbind(1)
        return chosen - rejected

    # ------------------------------------------------------------ a stage

    def begin(self, run: StageRun) -> None:
        super().begin(run)
        opening = self.opening
        self._experts = open_balance(opening, run.strategy.model)
        backend, _ = choose_backend(opening.recipe.model.attention, torch.device(opening.context.device).type, opening.stage.precision)
        use_shared_prompt_attention(run.strategy.model, backend)

    def steps(self, start: int) -> Iterator[StepExamples]:
        assert self.run is not None
        mark = self.run.mark
        self._make_reference(lambda: mark(start + 1, "computing reference log-probabilities before"))
        return super().steps(start)

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """Loss, accuracy and mean margin of the held-out rows."""
        alive()
        self._make_reference(alive)
        packs: list[AnswerPack] = self.opening.feed.held_out()
        most = int(self.opening.gather([float(len(packs))]).max())
        packs = packs + [self.empty()] * (max(most, 1) - len(packs))
        model = self.strategy.model
        model.eval()
        self.before(packs, 1.0)
        weight = float(self.opening.gather([float(sum(self.weight(pack) for pack in packs))]).sum())
        loss = 0.0
        for pack in packs:
            alive()
            batch = self.batch(pack)
            loss += float(self.strategy.loss(batch))
            self.seen(pack, batch)
        model.train()
        total = float(self.opening.gather([loss]).sum())
        found = self._figures()
        wanted = ("accuracy", "margin")
        return {"preference/loss": total / weight} | {f"preference/{key}": found[key] for key in wanted} if weight else {}

    def _make_reference(self, alive: Callable[[], None]) -> None:
        """Before the first step, under the weights that the stage starts from; afterwards the table comes from a checkpoint."""
        if self._table is not None or not self.with_reference:
            return
        opening = self.opening
        feed: AnswerFeed = opening.feed  # type: ignore[assignment]
        rows = feed.rows()
        identity = stage_hash(opening.recipe, opening.recipe.stages.index(opening.stage))
        model = self.strategy.model
        model.eval()
        self._table = reference.compute(
            rows, [feed.name(row) for row in rows], feed.read, self._measured, empty_answers(), opening.gather, opening.context.rank,
            opening.context.world_size, opening.stage_dir / "reference", identity, alive,
        )  # fmt: skip
        model.train()

    def _measured(self, pack: AnswerPack) -> np.ndarray:
        """float32 [A] under the current weights, without gradients. Every rank calls it equally often."""
        batch = answer_batch(pack, None, self.opening.context.device, self.opening.dtype)
        self.strategy.loss(batch)
        return batch.results["logprobs"].cpu().numpy()

    def finished(self) -> None:
        reference.forget(self.opening.stage_dir / "reference")

    # ------------------------------------------------------------ a step

    def loss(self, model: Any, batch: AnswerBatch) -> torch.Tensor:
        if self._experts is None or batch.reference is None:  # that measures, and trains nothing
            return self._compared(model, batch)
        return self._experts.loss(model, batch.batch, lambda: self._compared(model, batch))

    def _compared(self, model: Any, batch: AnswerBatch) -> torch.Tensor:
        logprobs = answer_logprobs(model, batch, self._chunk_tokens)
        batch.results = {"logprobs": logprobs.detach()}
        if batch.reference is None or not batch.lengths:
            return 0.0 * logprobs.sum()
        tokens = torch.tensor(batch.lengths, dtype=torch.float32, device=logprobs.device)
        scored = Scored(logprobs, batch.reference, tokens, batch.wanted)
        losses, rewards = self.losses(scored)
        batch.results["rewards"] = rewards.detach()
        total = losses.sum()
        return total - self._sft_factor * logprobs[batch.wanted].sum() if self.sft_weight else total

    def weight(self, example: AnswerPack) -> float:
        """Pairs."""
        return len(example.names)

    def count(self, taken: StepExamples) -> Counts:
        packs: list[AnswerPack] = taken.examples
        rows = sum(pack.rows for pack in packs)
        return Counts(
            supervised_tokens=sum(sum(pack.lengths) for pack in packs),
            tokens=rows,
            samples=sum(len(pack.names) for pack in packs),
            visual_tokens=sum(pack.visual_tokens for pack in packs),
            rows=rows,
            damaged_samples=taken.damaged_samples,
            samples_per_source=Counter(source for pack in packs for source in pack.sources),
        )

    def batch(self, example: AnswerPack) -> AnswerBatch:
        found = self._table.of_answers(example) if self._table is not None else [0.0] * len(example.lengths)
        return answer_batch(example, found, self.opening.context.device, self.opening.dtype)

    def empty(self) -> AnswerPack:
        return empty_answers()

    def before(self, examples: Sequence[AnswerPack], scale: float) -> None:
        """The share of a pair in the mean over the chosen answers' tokens, which are counted over all ranks."""
        self._sums = np.zeros(len(FIGURES))
        if self.sft_weight:
            weights = float(sum(self.weight(pack) for pack in examples))
            tokens = float(sum(length for pack in examples for length, wanted in zip(pack.lengths, pack.wanted) if wanted))
            whole = self.opening.gather([weights, tokens]).sum(axis=0)
            self._sft_factor = self.sft_weight * float(whole[0]) / max(1.0, float(whole[1]))
        if self._experts and self.strategy.model.training:  # held-out losses are without
            self._experts.before(
                examples, scale, lambda example: self.strategy.loss(self.batch(example)), lambda example: len(example.pack.segment_ends)
            )
        elif self._experts:
            self._experts.rest()

    def seen(self, example: AnswerPack, batch: AnswerBatch) -> None:
        if not batch.lengths:
            return
        logprobs, rewards = batch.results["logprobs"].cpu().double().numpy(), batch.results["rewards"].cpu().double()
        margins = self.margins(rewards, batch.wanted.cpu()).numpy()
        lengths, wanted = np.asarray(batch.lengths, np.float64), np.asarray(example.wanted)
        right = float((margins > 0).sum()) + 0.5 * float((margins == 0).sum())  # no opinion is as good as a coin
        self._sums += (
            right, len(margins), float(margins.sum()),
            wanted.sum(), logprobs[wanted].sum(), lengths[wanted].sum(), (~wanted).sum(), logprobs[~wanted].sum(), lengths[~wanted].sum(),
        )  # fmt: skip

    def values(self, ran: bool) -> dict[str, Any]:
        balance = self._experts.values(ran) if self._experts else {}
        return self._figures() | balance if ran else {}

    def _figures(self) -> dict[str, float]:
        """Means over the rows of all ranks since `before`. Every rank calls it."""
        sums = dict(zip(FIGURES, self.opening.gather(self._sums.tolist()).sum(axis=0).tolist()))
        judged = max(1.0, sums["judged"])
        found = {"accuracy": sums["right"] / judged, "margin": sums["margin"] / judged}
        for side in ("chosen", "rejected"):
            if sums[side]:
                found |= {f"{side}_{what}": sums[f"{side}_{what}"] / sums[side] for what in ("logprob", "tokens")}
        return found

    def pack_of(self, example: AnswerPack) -> PackedExample:
        return example.pack

    # ------------------------------------------------------------ checkpoints

    def state(self) -> Iterable[tuple[str, torch.Tensor]]:
        if self._table is not None:
            yield from ((f"reference/{name}", tensor) for name, tensor in self._table.tensors().items())

    def load(self, source: Callable[[str], torch.Tensor]) -> None:
        if self.with_reference:
            self._table = ReferenceTable()
            self._table.load(source("reference/names"), source("reference/logprobs"))
