"""The stretches of a stage between its `changes`: what each draws from, and how a draw goes on from one to the next.

A stretch has its own mixture, and its own training items where the resolution differs. A source whose items are the same
ones goes on where it stood, so that no sample is lost or repeated at a change; one whose items differ (a sample is too long at
the new resolution, a document is cut elsewhere) begins a new pass. A window never lies across a change: the last ones before it
are made small enough to end there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from terrace.data.order.items import EligibleSource, StageSource
from terrace.data.order.mixture import Interleave, rounded_weights, whole_weights
from terrace.data.order.permutation import source_rows
from terrace.recipe.schema import Stage
from terrace.recipe.stretches import stretches

COLUMNS = ("rows", "lengths", "visual_tokens", "pixel_rows", "pixels_max", "starts", "stops")


@dataclass
class Stretch:
    """Packs [first_pack, stop_pack) of a stage; the last stretch has no `stop_pack`."""

    number: int
    stage: Stage  # with the pixels and weights of the stretch
    first_pack: int
    stop_pack: int | None
    sources: list[StageSource]  # of the stage's whole mixture, in its order
    weights: dict[str, int]  # whole numbers of samples; 0: waits for another stretch
    limits: list[int | None]
    pixels: tuple[int, int] | None  # bounds that differ from the stage's
    interleave: Interleave | None = None  # None until it is known how far the sources were drawn before
    drawn: tuple[int, ...] = ()  # samples of each source before the stretch

    def begin(self, drawn: Sequence[int]) -> Interleave:
        """Ready to draw, behind `drawn` samples of each source."""
        if self.interleave is None or self.drawn != tuple(drawn):
            self.drawn = tuple(int(count) for count in drawn)
            self.interleave = Interleave([source.name for source in self.sources], self.weights, self.limits, given=self.drawn)
        return self.interleave

    def goes_on(self, before: Stretch, counts: np.ndarray) -> Interleave:
        """Begins where the stretch before ends, after `counts` samples of each source."""
        same = [_same_items(old, new) for old, new in zip(before.sources, self.sources)]
        return self.begin([int(count) if kept else 0 for count, kept in zip(counts, same)])

    def columns(self, start: int, stop: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The sources of positions [start, stop) of the stretch, int16, and the columns of their items, int64 each; `epochs` are the
        passes over the source before this one."""
        assert self.interleave is not None
        sources, draws = self.interleave.draw(start, stop)
        columns = {name: np.empty(len(sources), dtype=np.int64) for name in (*COLUMNS, "epochs")}
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(sources == number)
            if here.size:
                items = source.take(source_rows(draws[here], source.count, seed, source.name))
                for name in COLUMNS:
                    columns[name][here] = getattr(items, name)
                columns["epochs"][here] = draws[here] // source.count
        return sources, columns


def make_stretches(stage: Stage, sources: Sequence[Mapping[str, StageSource]]) -> list[Stretch]:
    """The stretches of a stage; `sources` of each, by name. The first is ready to draw."""
    parts = stretches(stage)
    ends = [step * stage.batch.packs for step, _ in parts[1:]]
    own = (stage.pixels.min, stage.pixels.max)
    found = []
    for number, ((step, part), by_name) in enumerate(zip(parts, sources, strict=True)):
        listed = [by_name[name] for name in stage.mixture.weights]
        weights = dict.fromkeys(stage.mixture.weights, 0) | _sample_weights(part, [s for s in listed if s.name in part.mixture.weights])
        bounds = (part.pixels.min, part.pixels.max)
        found.append(Stretch(
            number, part, step * stage.batch.packs, ends[number] if number < len(ends) else None, listed, weights,
            [_limit(part, source) for source in listed], None if bounds == own else bounds,
        ))  # fmt: skip
    found[0].begin([0] * len(stage.mixture.weights))
    return found


def _same_items(old: StageSource, new: StageSource) -> bool:
    """Whether the n-th item of both is the same one."""
    if isinstance(old, EligibleSource) and isinstance(new, EligibleSource):
        return old.items.placed == new.items.placed
    return old.count == new.count


def _sample_weights(stage: Stage, sources: list[StageSource]) -> dict[str, int]:
    """The mixture's weights as whole numbers of samples.

    Weights in tokens are divided by the mean length at the stage's resolution, so token shares are exact over whole
    epochs and the order stays a formula. Computed weights (tokens, temperature) are rounded to parts of 100,000.
    """
    mixture = stage.mixture
    if mixture.unit == "samples" and not mixture.temperature:
        return whole_weights(mixture.weights)
    computed = {}
    for source in sources:
        weight = float(mixture.weights[source.name])
        size = source.count * (source.mean_tokens if mixture.unit == "tokens" else 1.0)
        weight *= size ** (mixture.temperature or 0.0)
        computed[source.name] = weight / (source.mean_tokens if mixture.unit == "tokens" else 1.0)
    return rounded_weights(computed)


def _limit(stage: Stage, source: StageSource) -> int | None:
    """The most samples a source gives in the stage: its epoch cap, and the epochs of an `epochs` budget."""
    epochs = [float(e) for e in (stage.mixture.epoch_caps.get(source.name), stage.budget.epochs) if e is not None]
    return math.ceil(Fraction(repr(min(epochs))) * source.count) if epochs else None
