"""Bradley-Terry: a chosen and a rejected answer to one prompt, and a score that prefers the chosen one.

    loss = -log sigmoid(score(prompt, chosen) - score(prompt, rejected)), summed over the pairs of a pack

The score is one linear map of the hidden state at the answer's last token. It is stored in the output row of a
placeholder, a token that no answer contains, so a reward model is a plain Hugging Face directory of the same class and
needs no head of its own. A pair is one unit (models.shared_prompt): the prompt and its images run once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from terrace.data.types import PackedExample
from terrace.models.attention import choose_backend
from terrace.models.batch import DeviceBatch, to_device
from terrace.models.families.registry import family_of_model, output_layer
from terrace.models.shared_prompt import Unit, units_hidden, use_shared_prompt_attention
from terrace.objectives.experts import ExpertBalance, open_balance
from terrace.objectives.interface import Counts, Objective, Opening, StageRun, StepExamples
from terrace.objectives.lm import empty_pack


@dataclass(frozen=True)
class PairPack:
    """Pairs laid out as units of one pack, on the host. `sources` names each pair's source."""

    pack: PackedExample
    units: list[Unit]
    answers: list[int]  # the place of each answer's last token: chosen and rejected by turns
    rows: int
    visual_tokens: int
    sources: list[str]


@dataclass
class PairBatch:
    """Answers on the device; N of them, for training chosen and rejected by turns. `results` is filled by the loss."""

    batch: DeviceBatch
    units: list[Unit]
    rows: torch.Tensor  # int64 [N]: the place of each answer's last token
    results: dict[str, torch.Tensor] = field(default_factory=dict)


class RewardModel(Objective):
    """Packs of pairs; `feed.held_out` is a function that reads this rank's held-out packs."""

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._right = 0.0
        self._pairs = 0.0
        self._experts: ExpertBalance | None = None

    def begin(self, run: StageRun) -> None:
        super().begin(run)
        opening = self.opening
        device = torch.device(opening.context.device).type
        backend, _ = choose_backend(opening.recipe.model.attention, device, opening.stage.precision)
        use_shared_prompt_attention(run.strategy.model, backend)
        self._experts = open_balance(opening, run.strategy.model)

    def loss(self, model: Any, batch: PairBatch) -> torch.Tensor:
        def plain() -> torch.Tensor:
            return summed_preference_loss(model, batch)

        return self._experts.loss(model, batch.batch, plain) if self._experts else plain()

    def weight(self, example: PairPack) -> float:
        return len(example.sources)

    def count(self, taken: StepExamples) -> Counts:
        packs: list[PairPack] = taken.examples
        pairs, rows = sum(len(pack.sources) for pack in packs), sum(pack.rows for pack in packs)
        return Counts(
            supervised_tokens=2 * pairs,
            tokens=rows,
            samples=pairs,
            visual_tokens=sum(pack.visual_tokens for pack in packs),
            rows=rows,
            damaged_samples=taken.damaged_samples,
            samples_per_source=Counter(source for pack in packs for source in pack.sources),
        )

    def batch(self, example: PairPack) -> PairBatch:
        return pair_batch(example, self.opening.context.device, self.opening.dtype)

    def empty(self) -> PairPack:
        return PairPack(empty_pack(), [Unit(0, 1)], [], 0, 0, [])

    def before(self, examples: list[PairPack], scale: float) -> None:
        self._right = 0.0
        if self._experts:
            self._experts.before(
                examples, scale, lambda example: self.strategy.loss(self.batch(example)), lambda example: len(example.pack.segment_ends)
            )

    def seen(self, example: PairPack, batch: PairBatch) -> None:
        self._right += float((batch.results.get("margins", torch.zeros(0)) > 0).sum())

    def mean(self, total: float, divisor: float) -> float:
        self._pairs = max(1.0, divisor)
        return total / self._pairs  # not times its inverse: the last bit of the loss is that of the first runs

    def values(self, ran: bool) -> dict[str, Any]:
        balance = self._experts.values(ran) if self._experts else {}
        if not ran:
            return {}
        return {"accuracy": float(self.opening.gather([self._right]).sum()) / self._pairs} | balance

    def pack_of(self, example: PairPack) -> PackedExample:
        return example.pack

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """Of the held-out pairs: loss, accuracy (share whose chosen answer scores higher), and mean and deviation of all scores, by which a
        reward may centre and scale them."""
        alive()
        if self._experts:
            self._experts.rest()
        packs: list[PairPack] = self.opening.feed.held_out()
        most = int(self.opening.gather([float(len(packs))]).max())
        sums = [0.0, 0.0, 0.0, 0.0, 0.0]
        for pack in packs + [self.empty()] * (max(most, 1) - len(packs)):
            alive()
            batch = self.batch(pack)
            sums[0] += float(self.strategy.loss(batch))
            margins = batch.results.get("margins", torch.zeros(0))
            sums[1], sums[2] = sums[1] + float((margins > 0).sum()), sums[2] + len(margins)
            values = batch.results.get("scores", torch.zeros(0)).double()
            sums[3], sums[4] = sums[3] + float(values.sum()), sums[4] + float((values**2).sum())
        loss, right, count, total, squares = self.opening.gather(sums).sum(axis=0)
        if not count:
            return {}
        mean = total / (2 * count)
        return {
            "preference/loss": float(loss / count), "preference/accuracy": float(right / count), "preference/score_mean": float(mean),
            "preference/score_deviation": float(max(squares / (2 * count) - mean**2, 0.0) ** 0.5),
        }  # fmt: skip


open_objective = RewardModel


def score_token(model: Any) -> int:
    """The placeholder in whose output row the score lies: the family's last one."""
    return family_of_model(model).visual_ids(model.config)[-1]


def scores(model: Any, batch: PairBatch) -> torch.Tensor:
    """float32 [N]: the score of each answer."""
    hidden = units_hidden(model, batch.batch, batch.units)
    return output_layer(model)(hidden.index_select(0, batch.rows)).float()[:, score_token(model)]


def summed_preference_loss(model: Any, batch: PairBatch) -> torch.Tensor:
    """Float32 scalar. A pack without pairs still runs the model, for the collectives."""
    if not len(batch.rows):
        return 0.0 * units_hidden(model, batch.batch, batch.units).float().sum()
    both = scores(model, batch)
    chosen, rejected = both.view(-1, 2).unbind(1)
    batch.results = {"margins": (chosen - rejected).detach(), "scores": both.detach()}
    return -F.logsigmoid(chosen - rejected).sum()


def pair_batch(pack: PairPack, device: torch.device | str, dtype: torch.dtype) -> PairBatch:
    """One pack on the device."""
    rows = torch.tensor(pack.answers, dtype=torch.int64, device=device)
    return PairBatch(to_device(pack.pack, device, dtype), pack.units, rows)


def answer_rows(units: list[Unit]) -> list[int]:
    """The place of every answer's last token in a pack of units."""
    rows = []
    for unit in units:
        end = unit.start + unit.prompt
        for length in unit.responses:
            end += length
            rows.append(end - 1)
    return rows
