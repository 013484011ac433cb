"""SwAV: each view predicts the prototypes that another view of its picture is assigned to, where the batch fills all prototypes alike.

    loss of a picture = mean over pairs (whole view a, other view v) of -sum over prototypes of Q_a log softmax(S_v / t)

S are cosines of the projector's vectors with the prototypes. Q is the assignment of the global batch's views a, exp(S_a / epsilon) scaled
in turn to equal sums of the prototypes and of the views (Sinkhorn and Knopp); it gets no gradient. Vectors of earlier batches may count
in it, from a queue.
"""

from __future__ import annotations

from typing import Any

import torch

from terrace.objectives.dino import crossed
from terrace.objectives.self_supervised import Seen, Told, ViewsObjective, newest, unit

WHOLE = 2  # views that are assigned: the first ones


class Swav(ViewsObjective):
    name = "swav"

    def first_state(self) -> dict[str, torch.Tensor]:
        return {"queue": torch.zeros(0, WHOLE, self.options.output_width, device=self.opening.context.device)}

    def losses(self, heads: Any, seen: Seen) -> Told:
        options = self.options
        vectors = unit(heads.projected(seen.features))
        scores = heads.prototypes(vectors, frozen=self.progress() < options.frozen_prototypes)
        with torch.no_grad():
            counted, queue = scores[:, :WHOLE], self.kept["queue"]
            if options.queue and len(queue) == options.queue and self.progress() >= options.queue_from:
                counted = torch.cat([heads.prototypes(queue.to(vectors)), counted])
            assigned = [assignment(counted[:, view] / options.sharpness, options.iterations) for view in range(WHOLE)]
            wanted = torch.stack(assigned, dim=1)[-len(vectors) :]
        return Told(crossed(wanted, scores / options.temperature), vectors, {"vectors": vectors[:, :WHOLE]} if options.queue else {})

    def remember(self, kept: dict[str, torch.Tensor], sums: dict[str, torch.Tensor], pictures: int) -> None:
        if self.options.queue:
            self.kept["queue"] = newest(self.kept["queue"], kept["vectors"], self.options.queue)


open_objective = Swav


def assignment(logits: torch.Tensor, iterations: int) -> torch.Tensor:
    """[N, K], every row a distribution, every column about N / K in all."""
    parts = (logits - logits.max()).exp()
    for _ in range(iterations):
        parts = parts / parts.sum(0, keepdim=True) / parts.shape[1]
        parts = parts / parts.sum(1, keepdim=True) / parts.shape[0]
    return parts * parts.shape[0]
