"""Which samples may stand in for a damaged one (`on_damage: skip`), decided from the plan before anything is read.

For every place of a pack a short list: samples of the same source, at most as long as the one they would replace and with at most as
many image tokens, nearest in length first, walked in an order seeded by pack and place. A task carries the list as numbers, about 100
bytes a candidate, and takes the first that can be read. So the same damage gives the same packs for any number of workers and after
any resume. Where a candidate's bytes lie is looked up in the index file only when it is needed: one group of rows, not the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from terrace.data.order.items import EligibleSource
from terrace.data.order.permutation import permute, seed_of
from terrace.data.types import PackSpec

SPARES = 8  # candidates per place: with a tenth of a source damaged, one place in a hundred million finds none
BANDS = (16, 256)  # neighbours in length among which the walk jumps: an eighth of the samples that fit, within these


@dataclass(frozen=True, slots=True)
class Spare:
    """A training item of the plan, by its columns in `eligible.Items`."""

    row: int
    length: int  # tokens
    visual_tokens: int
    pixel_rows: int
    pixels_max: int  # 0: the stage's
    start: int
    stop: int  # -1: the whole sample

    def alone(self, spec: PackSpec) -> PackSpec:
        """`spec` with this item as its only sample; the reference is for whoever knows its source and id."""
        return PackSpec(
            pack=spec.pack,
            samples=(),
            lengths=(self.length,),
            visual_tokens=(self.visual_tokens,),
            pixel_rows=self.pixel_rows,
            window=spec.window,
            pixels_max=(self.pixels_max,) if self.pixels_max else (),
            spans=((self.start, self.stop),) if self.stop >= 0 else (),
            pixels=spec.pixels,
        )


PackSpares = tuple[tuple[Spare, ...], ...]  # per sample of the pack; empty for sources that stop
SparesOf = Callable[[PackSpec], PackSpares]


def spares_of_pack(spec: PackSpec, sources: dict[str, EligibleSource], seed: int) -> PackSpares:
    """Candidates for each sample of a pack whose source is among `sources`."""
    taken = {name: {ref.row for ref in spec.samples if ref.source == name} for name in sources}
    found = []
    for place, (ref, length, visual_tokens) in enumerate(zip(spec.samples, spec.lengths, spec.visual_tokens)):
        walk = seed_of(seed, "spare", spec.pack, place)
        source = sources.get(ref.source)
        found.append(_candidates(source, length, visual_tokens, walk, taken[ref.source]) if source else ())
    return tuple(found)


def _candidates(source: EligibleSource, length: int, visual_tokens: int, seed: int, taken: Collection[int]) -> tuple[Spare, ...]:
    """Up to `SPARES` items of at most `length` tokens and `visual_tokens` image tokens, outside the rows `taken`."""
    found: list[Spare] = []
    end = source.items.up_to(length)
    width = min(max(end // 8, BANDS[0]), BANDS[1])
    turn = 0
    while end > 0 and len(found) < SPARES and turn < SPARES:
        band = source.items.by_length[max(0, end - width) : end]
        steps = np.arange(min(len(band), 2 * SPARES))
        items = source.items[band[permute(steps, len(band), seed_of(seed, turn))]]
        columns = (items.rows, items.lengths, items.visual_tokens, items.pixel_rows, items.pixels_max, items.starts, items.stops)
        good = (Spare(*values) for values in zip(*(column.tolist() for column in columns)))
        found += [spare for spare in good if spare.visual_tokens <= visual_tokens and spare.row not in taken]
        end, turn = end - width, turn + 1
    return tuple(found[:SPARES])
