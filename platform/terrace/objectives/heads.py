"""What mtp and medusa share: packs of the data path, the model's own loss beside those of the heads, acceptance of what heads would draft.

    loss = the model's own next-token loss (where a part of it trains) + sum over heads of weight_k * cross-entropy of token[i + k + 1]

All are summed over the supervised tokens that they predict and divided by the supervised tokens of the global batch. A target that lies in
another segment than its row is nobody's. Only targets that the data path supervises count, as for the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from terrace.models.batch import DeviceBatch
from terrace.models.families.registry import output_layer
from terrace.models.forward import pack_hidden
from terrace.objectives.interface import Opening
from terrace.objectives.lm import LanguageModelling
from terrace.recipe.schema import PARTS


@dataclass(frozen=True)
class Ahead:
    """What a head predicts in a pack: the rows it reads and the places of `DeviceBatch.supervised_rows` whose targets it predicts."""

    rows: torch.Tensor  # int64 [N]
    places: torch.Tensor  # int64 [N]


def ahead(batch: DeviceBatch, steps: int) -> Ahead:
    """Rows `steps` before the supervised ones, where both lie in one segment."""
    supervised = np.flatnonzero(batch.example.targets >= 0)
    ends = np.asarray(batch.boundaries[1:])
    starts = np.asarray(batch.boundaries[:-1])
    segment = np.searchsorted(ends, supervised, side="right")
    there = supervised - steps >= starts[segment] if len(supervised) else np.zeros(0, bool)
    rows = torch.from_numpy((supervised[there] - steps).astype(np.int64)).to(batch.device)
    return Ahead(rows, torch.from_numpy(np.flatnonzero(there)).to(batch.device))


class HeadsObjective(LanguageModelling):
    """A subclass gives the heads' hidden rows and output layers, and their weights."""

    measured = False  # the arithmetic of FLOPs knows nothing of heads

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        # ZeRO-3: every call of an output layer is a collective, so ranks must make equally many.
        self._one_call = opening.stage.parallel.strategy == "zero3"
        self._with_own_loss = any(getattr(opening.stage.train, part) is not None for part in PARTS)
        self._found: list[torch.Tensor] = []  # of each example: the own loss, those of the heads
        self._accepted: list[torch.Tensor] | None = None  # of each example: drafts that are the model's choice, and drafts

    # ------------------------------------------------------------ what an objective says

    def weights(self) -> list[float]:
        """Of each head's loss."""
        raise NotImplementedError

    def outputs(self, model: Any, batch: DeviceBatch, hidden: torch.Tensor) -> list[tuple[Ahead, torch.Tensor, Any]]:
        """Per head: what it predicts, its hidden rows [N, H] for that, and its output layer (a models.head.LossHead)."""
        raise NotImplementedError

    # ------------------------------------------------------------ a step

    def loss(self, model: Any, batch: DeviceBatch) -> torch.Tensor:
        def plain() -> torch.Tensor:
            return self._summed(model, batch)

        return self._experts.loss(model, batch, plain) if self._experts and self._with_own_loss else plain()

    def _summed(self, model: Any, batch: DeviceBatch) -> torch.Tensor:
        chunk = self.opening.stage.loss_chunk_tokens
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._with_own_loss):
            hidden = pack_hidden(model, batch)
            own = output_layer(model)(hidden.index_select(0, batch.supervised_rows), batch.targets, chunk)
        outputs = self.outputs(model, batch, hidden)
        heads = [layer(rows, batch.targets.index_select(0, what.places), chunk) for what, rows, layer in outputs]
        total = sum((weight * loss for weight, loss in zip(self.weights(), heads)), own if self._with_own_loss else 0.0 * own.detach())
        self._found.append(torch.stack([own.detach(), *(loss.detach() for loss in heads)]))
        if self._accepted is not None:
            chosen = self._chosen(output_layer(model), hidden.index_select(0, batch.supervised_rows))
            right = [(self._chosen(layer, rows) == chosen.index_select(0, what.places)).sum() for what, rows, layer in outputs]
            drafts = [torch.tensor(len(what.rows), device=chosen.device) for what, *_ in outputs]
            self._accepted.append(torch.stack([*right, *drafts]))
        return total

    def _chosen(self, layer: Any, rows: torch.Tensor) -> torch.Tensor:
        """int64 [N]: the most likely token of each row."""
        if self._one_call or not len(rows):
            return layer(rows).argmax(dim=1)
        return torch.cat([layer(part).argmax(dim=1) for part in rows.split(self.opening.stage.loss_chunk_tokens)])

    def before(self, examples: Sequence[Any], scale: float) -> None:
        if self._with_own_loss:
            super().before(examples, scale)
        self._found, self._scale = [], scale

    def values(self, ran: bool) -> dict[str, Any]:
        """The model's own loss and each head's, unweighted, per supervised token of the batch."""
        if not ran:
            return {}
        shared = super().values(ran) if self._with_own_loss else {}
        sums = self.opening.gather(torch.stack(self._found).double().sum(dim=0).tolist()).sum(axis=0) * self._scale
        return shared | {"own_loss": float(sums[0])} | {f"head_{number}_loss": float(value) for number, value in enumerate(sums[1:], 1)}

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """The loss of each kind of held-out samples, and the share of drafts of each head that are what the model itself would choose
        where all tokens before them are given."""
        self._accepted = []
        losses = super().evaluate(alive)
        count = len(self.weights())
        found = torch.stack(self._accepted).double().sum(dim=0).tolist() if self._accepted else [0.0] * (2 * count)
        sums = self.opening.gather(found).sum(axis=0)
        self._accepted, self._found = None, []
        return losses | {f"acceptance/{k + 1}": float(sums[k] / sums[count + k]) for k in range(count) if sums[count + k]}
