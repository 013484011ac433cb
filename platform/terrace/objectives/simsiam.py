"""SimSiam: from one view predict what the same tower says of the other, which gets no gradient. There is no teacher and no wrong answer.

    loss of a picture = -1/2 (p_1.z_2 + p_2.z_1)

p is the predictor behind the projector z, both of length 1; z is held fixed.
"""

from __future__ import annotations

from typing import Any

from terrace.objectives.self_supervised import Seen, Told, ViewsObjective, unit


class Simsiam(ViewsObjective):
    name = "simsiam"
    compares = False

    def losses(self, heads: Any, seen: Seen) -> Told:
        vectors = heads.projected(seen.features)
        found, wanted = unit(heads.predicted(vectors)), unit(vectors.detach())
        return Told(-0.5 * (found * wanted.flip(1)).sum((1, 2)), unit(vectors))


open_objective = Simsiam
