"""The heads behind the tower of each objective over views, as plain numbers: what models.view_heads builds and the planner counts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from terrace.recipe.schema_views import (
    ByolOptions,
    CpcOptions,
    DinoOptions,
    MocoOptions,
    Projector,
    SimsiamOptions,
    SwavOptions,
)


@dataclass(frozen=True)
class Layers:
    """Linear layers between `widths`; norm and rectifier follow each but the last, which may have a norm without numbers of its own."""

    widths: tuple[int, ...]
    norm: str  # batch, layer or none
    final_norm: bool = False
    rectifier: str = "relu"
    small_start: bool = False  # weights drawn with a deviation of 0.02 and biases of 0, so that nothing but the picture is said at first

    @property
    def parameters(self) -> int:
        """A layer has a bias where no norm follows it."""
        inner = 2 if self.norm != "none" else 1
        hidden = sum(before * after + inner * after for before, after in pairwise(self.widths[:-1]))
        before, after = self.widths[-2:]
        return hidden + before * after + (0 if self.final_norm else after)


@dataclass(frozen=True)
class HeadPlan:
    projector: Layers
    predictor: Layers | None = None
    prototypes: int = 0  # rows of the projector's output width
    context: tuple[int, int] | None = None  # width of the context, rows ahead that are predicted from it

    @property
    def parameters(self) -> int:
        width = self.projector.widths[-1]
        total = self.projector.parameters + self.prototypes * width
        if self.predictor is not None:
            total += self.predictor.parameters
        if self.context is not None:
            inner, ahead = self.context
            total += 3 * inner * (width + inner + 2) + ahead * inner * width  # a gated recurrent unit, and a map for each row
        return total


def head_plan(options: Projector, width: int) -> HeadPlan:
    """Of a stage's options and the width of what the tower says of a picture."""
    normed = options.norm != "none"

    def layers(first: int, count: int, final_norm: bool, hidden: int | None = None, **more: Any) -> Layers:
        inner = (hidden or options.hidden_width,) * (count - 1)
        return Layers((first, *inner, options.output_width), options.norm, final_norm and normed, **more)

    if isinstance(options, DinoOptions):
        return HeadPlan(layers(width, options.layers, False, rectifier="gelu", small_start=True), prototypes=options.prototypes)
    if isinstance(options, SwavOptions):
        return HeadPlan(layers(width, options.layers, False), prototypes=options.prototypes)
    if isinstance(options, CpcOptions):
        return HeadPlan(layers(width, options.layers, False), context=(options.context_width, options.ahead))
    if isinstance(options, MocoOptions):
        v3 = not options.queue
        predictor = layers(options.output_width, 2, True) if v3 else None
        return HeadPlan(layers(width, options.layers, v3), predictor)
    if isinstance(options, ByolOptions):
        return HeadPlan(layers(width, options.layers, False), layers(options.output_width, 2, False))
    if isinstance(options, SimsiamOptions):
        predictor = layers(options.output_width, 2, False, options.predictor_width)
        return HeadPlan(layers(width, options.layers, True), predictor)
    return HeadPlan(layers(width, options.layers, False))
