"""MoCo: a query of one view finds the key that a slowly moving teacher gives of the other, among wrong keys.

    v2 (with `queue`):  loss = -log softmax([q.k, q.queue] / t) of q.k;                 then the batch's keys enter the queue
    v3 (without):       loss = 2 t sum over both ways of -log softmax(q_1.k_2' / t) of the own key, k' being those of the batch

q come from the student's projector (v3: and predictor), k from the teacher's projector, all of length 1. The queue holds keys of the
latest pictures in the order of the global batch; it starts with random ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from terrace.objectives.self_supervised import Seen, Told, ViewsObjective, newest, unit


class Moco(ViewsObjective):
    name = "moco"

    @property
    def compares(self) -> bool:
        return not self.options.queue

    def student_views(self) -> Any:
        return (0,) if self.options.queue else slice(None)

    def teacher_views(self) -> tuple[int, ...]:
        return (1,) if self.options.queue else (0, 1)

    def first_state(self) -> dict[str, torch.Tensor]:
        if not self.options.queue:
            return {}
        rows = self.rng("queue").standard_normal((self.options.queue, self.options.output_width))
        return {"queue": unit(torch.from_numpy(rows.astype(np.float32)).to(self.opening.context.device))}

    def losses(self, heads: Any, seen: Seen) -> Told:
        options = self.options
        keys = unit(self.teacher.model.heads.projected(seen.teacher))
        vectors = heads.projected(seen.features)
        if options.queue:
            vectors = unit(vectors)
            query, right = vectors[:, 0], (vectors[:, 0] * keys[:, 0]).sum(-1, keepdim=True)
            logits = torch.cat([right, query @ self.kept["queue"].to(query).T], dim=1) / options.temperature
            return Told(logits.logsumexp(1) - logits[:, 0], vectors, {"keys": keys[:, 0]})
        queries, losses = unit(heads.predicted(vectors)), 0.0
        for view in (0, 1):
            logits = queries[:, view] @ keys[:, 1 - view].T / options.temperature
            losses = losses + 2 * options.temperature * (logits.logsumexp(1) - logits.diagonal())
        return Told(losses, unit(vectors))

    def remember(self, kept: dict[str, torch.Tensor], sums: dict[str, torch.Tensor], pictures: int) -> None:
        if self.options.queue:
            self.kept["queue"] = newest(self.kept["queue"], kept["keys"], self.options.queue)


open_objective = Moco
