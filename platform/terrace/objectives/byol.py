"""BYOL: from one view predict what a slowly moving teacher says of the other. There are no wrong answers.

    loss of a picture = sum over both ways of |p_1 - t_2|^2 = 2 - 2 p_1.t_2

p is the student's predictor behind its projector, t the teacher's projector, both of length 1.
"""

from __future__ import annotations

from typing import Any

from terrace.objectives.self_supervised import Seen, Told, ViewsObjective, unit


class Byol(ViewsObjective):
    name = "byol"
    compares = False

    def teacher_views(self) -> tuple[int, ...]:
        return (0, 1)

    def losses(self, heads: Any, seen: Seen) -> Told:
        wanted = unit(self.teacher.model.heads.projected(seen.teacher))
        vectors = heads.projected(seen.features)
        found = unit(heads.predicted(vectors))
        return Told(4.0 - 2.0 * (found * wanted.flip(1)).sum((1, 2)), unit(vectors))


open_objective = Byol
