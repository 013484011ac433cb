"""DINO: the student's distribution over prototypes, of every view, follows that of a teacher of the two whole views.

    loss of a picture = mean over pairs (teacher's view a, other view v) of -sum over prototypes of
                        softmax((T_a - c) / t_t) log softmax(S_v / t_s)

S and T are cosines of the projector's vectors with the prototypes. The centre c follows the teacher's mean over the global batch, and its
temperature is low at first: together they keep all pictures from becoming one class.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from terrace.objectives.self_supervised import Seen, Told, ViewsObjective, unit

TINY = 1e-30  # below any probability that counts


class Dino(ViewsObjective):
    name = "dino"
    compares = False

    def teacher_views(self) -> tuple[int, ...]:
        return (0, 1)

    def first_state(self) -> dict[str, torch.Tensor]:
        return {"centre": torch.zeros(self.options.prototypes, device=self.opening.context.device)}

    def teacher_temperature(self) -> float:
        options = self.options
        warm = min(1.0, self.progress() / options.temperature_warmup) if options.temperature_warmup else 1.0
        return options.first_teacher_temperature + warm * (options.teacher_temperature - options.first_teacher_temperature)

    def losses(self, heads: Any, seen: Seen) -> Told:
        teacher = self.teacher.model.heads
        taught = teacher.prototypes(unit(teacher.projected(seen.teacher)))
        wanted = ((taught - self.kept["centre"].to(taught)) / self.teacher_temperature()).softmax(-1)
        vectors = unit(heads.projected(seen.features))
        scores = heads.prototypes(vectors, frozen=self.progress() < self.options.frozen_prototypes)
        sums = {"taught": taught.mean(1).sum(0), "entropy": -(wanted * wanted.clamp_min(TINY).log()).sum(-1).mean(1).sum()[None]}
        return Told(crossed(wanted, scores / self.options.student_temperature), vectors, sums=sums)

    def values(self, ran: bool) -> dict[str, Any]:
        """Beside the spread how sure the teacher is of a view: 0 where it names one prototype, 1 where all are alike to it."""
        found = super().values(ran)
        if ran:
            own = [sum(float(told.sums["entropy"]) for told in self._told), float(sum(len(told.losses) for told in self._told))]
            entropy, pictures = own if self.meets else self.opening.total(own).tolist()
            found["teacher_entropy"] = entropy / max(1.0, pictures) / math.log(self.options.prototypes)
        return found

    def remember(self, kept: dict[str, torch.Tensor], sums: dict[str, torch.Tensor], pictures: int) -> None:
        stays = self.options.centre_momentum
        self.kept["centre"] = stays * self.kept["centre"] + (1.0 - stays) * (sums["taught"] / pictures).float()


open_objective = Dino


def crossed(wanted: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """[N]: mean cross-entropy over pairs of a view of `wanted` [N, T, K], distributions, and another view of `logits` [N, V, K]."""
    told = -torch.einsum("ntk,nvk->ntv", wanted, logits.log_softmax(-1))
    views, other = logits.shape[1], ~torch.eye(wanted.shape[1], logits.shape[1], dtype=torch.bool, device=logits.device)
    return (told * other).sum((1, 2)) / (wanted.shape[1] * (views - 1))
