"""Which samples of a source take part in a stage, and as what: whole, shortened, cut up, or at lower resolution.

Everything is decided from the index before anything runs. The result is a few numpy columns, one entry per training
item (a piece of a split document is an item of its own), which the order permutes and the packing fits together.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from terrace.data.resize import smart_resize
from terrace.data.template import Measure, temporal_patches
from terrace.data.types import GRID_PIXELS, MERGE_SIZE
from terrace.recipe.schema import Source

LOWEST_PIXELS = 4 * GRID_PIXELS * GRID_PIXELS  # `reduce_resolution` stops at four image tokens


@dataclass(frozen=True)
class Items:
    """Columns of some training items; int64 or int32 [n] each."""

    rows: np.ndarray  # rows of the source's index
    lengths: np.ndarray  # tokens
    visual_tokens: np.ndarray
    patches: np.ndarray
    pixels_max: np.ndarray  # the sample's own limit of pixels per image, 0: the stage's
    starts: np.ndarray  # token range kept; stop -1: the whole sample
    stops: np.ndarray

    def __getitem__(self, selection: Any) -> Items:
        return Items(*(getattr(self, name)[selection] for name in Items.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.rows)


class StageSource(Protocol):
    """What the plan asks of a source; `EligibleSource` answers from an index, a test from a formula."""

    name: str
    count: int  # training items in one epoch
    mean_tokens: float  # per item
    changes: dict[str, int]  # how many samples were refused, split, shortened or reduced

    def take(self, numbers: np.ndarray) -> Items: ...

    def id_of(self, row: int) -> str: ...


@dataclass
class EligibleSource:
    """The training items of an indexed source for one stage."""

    name: str
    items: Items
    id_of: Callable[[int], str]
    changes: dict[str, int] = field(default_factory=dict)
    mark: str = ""  # changes when any item or its id does

    @property
    def count(self) -> int:
        return len(self.items)

    @property
    def mean_tokens(self) -> float:
        return float(self.items.lengths.mean()) if len(self.items) else 0.0

    def take(self, numbers: np.ndarray) -> Items:
        return self.items[numbers]

    @cached_property
    def by_length(self) -> np.ndarray:
        """int64 [N]: the items from the shortest to the longest."""
        return np.argsort(self.items.lengths, kind="stable")

    @cached_property
    def sorted_lengths(self) -> np.ndarray:
        return self.items.lengths[self.by_length]


def source_pixels(source: Source, pixels: tuple[int, int]) -> tuple[int, int]:
    """The stage's (min, max) pixels per image under the source's limit of visual tokens per image."""
    if source.max_visual_tokens_per_image is None:
        return pixels
    largest = min(pixels[1], source.max_visual_tokens_per_image * GRID_PIXELS**2)
    return min(pixels[0], largest), largest


def eligible_source(
    name: str,
    source: Source,
    index: Any,
    rows: np.ndarray,
    pixels: tuple[int, int],
    sequence_length: int,
    max_visual_tokens_per_pack: int | None,
) -> EligibleSource:
    """The training items of `rows` (int [n]) of an index at the stage's resolution, `source.too_long` applied.

    `index` is a SourceIndex: its columns give every length, and `measure(row)` and `sizes(row)` the details of
    the few samples that are too long.
    """
    bounds = source_pixels(source, pixels)
    lengths = np.asarray(index.lengths(bounds))[rows]
    visual = np.asarray(index.visual_tokens(bounds))[rows]
    patches = np.asarray(index.patches(bounds))[rows]
    own_limit = 0 if bounds == pixels else bounds[1]
    visual_limit = max_visual_tokens_per_pack or sequence_length
    too_long = (lengths > sequence_length) | (visual > visual_limit)
    fits = np.flatnonzero(~too_long)
    whole = Items(
        rows=rows[fits].astype(np.int64),
        lengths=lengths[fits].astype(np.int32),
        visual_tokens=visual[fits].astype(np.int32),
        patches=patches[fits].astype(np.int32),
        pixels_max=np.full(len(fits), own_limit, dtype=np.int32),
        starts=np.zeros(len(fits), dtype=np.int32),
        stops=np.full(len(fits), -1, dtype=np.int32),
    )
    changes: Counter[str] = Counter()
    extra: list[tuple[int, ...]] = []
    for row in rows[too_long].tolist():
        if source.too_long == "refuse":
            changes["refused"] += 1
            continue
        measure, sizes = index.measure(row), index.sizes(row)
        made = _fitted(source.too_long, measure, sizes, bounds, sequence_length, visual_limit)
        changes[source.too_long if made else "refused"] += 1
        extra += [(row, *item[:3], item[3] or own_limit, *item[4:]) for item in made]
    items = whole
    if extra:
        columns = np.asarray(extra, dtype=np.int64).T
        items = Items(*(np.concatenate([old, new.astype(old.dtype)]) for old, new in zip(_columns(whole), columns)))
        items = items[np.lexsort((items.starts, items.rows))]
    digest = hashlib.sha256(np.ascontiguousarray(index.columns["id_hash"]).tobytes())
    for column in _columns(items):
        digest.update(np.ascontiguousarray(column).tobytes())
    return EligibleSource(name, items, lambda row: str(index.ids[row]), dict(changes), digest.hexdigest())


def _columns(items: Items) -> list[np.ndarray]:
    return [getattr(items, name) for name in Items.__dataclass_fields__]


Fitted = tuple[int, int, int, int, int, int]  # tokens, visual tokens, patches, pixels_max (0: unchanged), start, stop


def _fitted(
    policy: str,
    measure: Measure,
    sizes: Sequence[tuple[int, int]],
    bounds: tuple[int, int],
    sequence_length: int,
    visual_limit: int,
) -> list[Fitted]:
    """The items that a too long sample becomes; empty: it cannot be helped by this policy."""
    if policy == "reduce_resolution":
        return _reduced(measure, sizes, bounds, sequence_length, visual_limit)
    images = visual_ranges(measure, sizes, bounds)
    total = measure.length(sizes, bounds)
    if policy == "truncate_text":
        stop = _outside_images(min(sequence_length, total), images, 0)
        kept = _piece(0, stop, images)
        return [kept] if stop > 1 and kept[1] <= visual_limit else []
    if measure.coordinates or not measure.cuts:
        return []  # conversations are never split; a document with coordinates has no fixed places to cut
    pieces = split_points(total, images, _cut_tokens(measure, images), sequence_length)
    made = [_piece(start, stop, images) for start, stop in pairwise(pieces)]
    return made if all(piece[0] <= sequence_length and piece[1] <= visual_limit for piece in made) else []


def visual_ranges(
    measure: Measure, sizes: Sequence[tuple[int, int]], bounds: tuple[int, int]
) -> list[tuple[int, int]]:
    """Token ranges of the images with their vision_start and vision_end, in order, at a resolution."""
    ranges, shown = [], 0
    for image, frames, fixed_before in measure.visuals:
        width, height = sizes[image]
        new_height, new_width = smart_resize(height, width, *bounds)
        tokens = temporal_patches(frames) * (new_height // GRID_PIXELS) * (new_width // GRID_PIXELS)
        start = fixed_before + shown
        ranges.append((start - 1, start + tokens + 1))
        shown += tokens
    return ranges


def _cut_tokens(measure: Measure, images: list[tuple[int, int]]) -> list[int]:
    """`measure.cuts` in tokens at this resolution."""
    cuts, shown, number = [], 0, 0
    for cut in measure.cuts:
        while number < len(images) and measure.visuals[number][2] < cut:
            shown += images[number][1] - images[number][0] - 2
            number += 1
        cuts.append(cut + shown)
    return cuts


def split_points(total: int, images: list[tuple[int, int]], cuts: list[int], limit: int) -> list[int]:
    """Where a document of `total` tokens is cut into pieces of at most `limit`: [0, ..., total].

    At the last line end or image end that fits; where none lies in the second half of the piece, between two tokens;
    never inside an image (then the piece may pass `limit`, and the caller refuses the document).
    """
    points = [0]
    while total - points[-1] > limit:
        furthest = points[-1] + limit
        good = [cut for cut in cuts if points[-1] + limit // 2 < cut <= furthest]
        point = good[-1] if good else _outside_images(furthest, images, points[-1])
        if point <= points[-1]:
            point = next(end for start, end in images if start <= points[-1] < end)
        points.append(point)
    return [*points, total]


def _outside_images(token: int, images: list[tuple[int, int]], lowest: int) -> int:
    for start, end in images:
        if start < token < end:
            return max(start, lowest)
    return token


def _piece(start: int, stop: int, images: list[tuple[int, int]]) -> Fitted:
    visual = sum(end - begin - 2 for begin, end in images if start <= begin and end <= stop)
    return stop - start, visual, visual * MERGE_SIZE**2, 0, start, stop


def _reduced(
    measure: Measure,
    sizes: Sequence[tuple[int, int]],
    bounds: tuple[int, int],
    sequence_length: int,
    visual_limit: int,
) -> list[Fitted]:
    """The highest resolution, by halving intervals of the pixel limit, at which the sample fits."""
    lowest, highest = LOWEST_PIXELS, bounds[1]

    def size_at(limit: int) -> tuple[int, int]:
        limits = (min(bounds[0], limit), limit)
        visual = sum(end - start - 2 for start, end in visual_ranges(measure, sizes, limits))
        return measure.length(sizes, limits), visual

    def fits(limit: int) -> bool:
        length, visual = size_at(limit)
        return length <= sequence_length and visual <= visual_limit

    if not measure.visuals or not fits(lowest):
        return []
    while highest - lowest > GRID_PIXELS**2:
        middle = (lowest + highest) // 2
        lowest, highest = (middle, highest) if fits(middle) else (lowest, middle)
    length, visual = size_at(lowest)
    return [(length, visual, visual * MERGE_SIZE**2, lowest, 0, -1)]
