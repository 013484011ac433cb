"""Which samples of a source take part in a stage, and as what: whole, shortened, cut up, or at lower resolution.

Everything is decided from the index before anything runs. The result is a few numpy columns, one entry per training
item (a piece of a split document is an item of its own), which the order permutes and the packing fits together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from terrace.data.order.items import Items, item_columns
from terrace.data.template import Measure
from terrace.families.interface import Family
from terrace.recipe.schema import Source

CHANGES = {  # a count's key -> what is said of so many samples
    "no_target": "without a target",
    "not_one_picture": "without exactly one picture, left out",
    "refused": "too long, left out",
    "split": "too long, split",
    "truncate_text": "too long, text cut",
    "reduce_resolution": "too long, pictures made smaller",
    "held_out_elsewhere": "held out elsewhere",
    "duplicate": "repeats, left out",
}


def told_changes(changes: Mapping[str, int]) -> str:
    """What became of samples that do not train as they are, for people; '' where all do."""
    return ", ".join(f"{count:,} {CHANGES[what]}" for what, count in changes.items() if count)


def source_pixels(source: Source, pixels: tuple[int, int], family: Family) -> tuple[int, int]:
    """The stage's (min, max) pixels per image under the source's limit of visual tokens per image."""
    if source.max_visual_tokens_per_image is None:
        return pixels
    largest = min(pixels[1], source.max_visual_tokens_per_image * family.unit)
    return min(pixels[0], largest), largest


@dataclass(frozen=True)
class Fitting:
    """What a stage asks of the items of a source."""

    pixels: tuple[int, int]
    sequence_length: int
    max_visual_tokens_per_pack: int | None = None
    needs_targets: bool = False  # a sample without anything to learn, or whose every target would be cut off, is left out and counted


def eligible_items(
    source: Source, index: Any, stretches: Iterable[np.ndarray], wanted: Fitting, changes: Counter[str]
) -> Iterator[Items]:
    """The training items of some rows of an index, one stretch of rows (int64, ascending) after another, `source.too_long` applied.

    `index` is a SourceIndex. `changes` is counted up: samples that were refused, split, shortened, reduced or left out.
    """
    for rows in stretches:
        items = _eligible(source, index.only(rows), wanted, changes)
        yield replace(items, rows=rows[items.rows].astype(np.int64))


def _eligible(source: Source, index: Any, wanted: Fitting, changes: Counter[str]) -> Items:
    """The items of all rows of a small index."""
    family, rows = index.family, np.arange(len(index))
    needs_targets, sequence_length = wanted.needs_targets, wanted.sequence_length
    if needs_targets and source.supervise != "all_text":
        learnt = np.asarray(index.supervised_tokens)[rows] > 0
        changes["no_target"] += int((~learnt).sum())
        rows = rows[learnt]
    bounds = source_pixels(source, wanted.pixels, family)
    lengths = np.asarray(index.lengths(bounds))[rows]
    visual = np.asarray(index.visual_tokens(bounds))[rows]
    pixel_rows = np.asarray(index.pixel_rows(bounds))[rows]
    own_limit = 0 if bounds == wanted.pixels else bounds[1]
    visual_limit = wanted.max_visual_tokens_per_pack or sequence_length
    too_long = (lengths > sequence_length) | (visual > visual_limit)
    fits = np.flatnonzero(~too_long)
    whole = Items(
        rows=rows[fits].astype(np.int64),
        lengths=lengths[fits].astype(np.int32),
        visual_tokens=visual[fits].astype(np.int32),
        pixel_rows=pixel_rows[fits].astype(np.int32),
        pixels_max=np.full(len(fits), own_limit, dtype=np.int32),
        starts=np.zeros(len(fits), dtype=np.int32),
        stops=np.full(len(fits), -1, dtype=np.int32),
    )
    extra: list[tuple[int, ...]] = []
    for row in rows[too_long].tolist():
        if source.too_long == "refuse":
            changes["refused"] += 1
            continue
        measure, sizes = index.measure(row), index.sizes(row)
        images = Sized(sizes, family)
        made = _fitted(source.too_long, measure, images, bounds, sequence_length, visual_limit)
        may_lose = made and needs_targets and source.too_long == "truncate_text" and source.supervise != "all_text"
        if may_lose and _first_target(measure, images, bounds) >= made[0][-1]:
            changes["no_target"] += 1
            continue
        changes[source.too_long if made else "refused"] += 1
        extra += [(row, *item[:3], item[3] or own_limit, *item[4:]) for item in made]
    if not extra:
        return whole
    columns = np.asarray(extra, dtype=np.int64).T
    items = Items(*(np.concatenate([old, new.astype(old.dtype)]) for old, new in zip(item_columns(whole), columns)))
    return items[np.lexsort((items.starts, items.rows))]


Fitted = tuple[int, int, int, int, int, int]  # tokens, visual tokens, rows of pixels, pixels_max (0: unchanged), start, stop


@dataclass(frozen=True)
class Sized:
    """The images of one sample, and the family that says what they become."""

    sizes: Sequence[tuple[int, int]]
    family: Family


@dataclass(frozen=True)
class VisualRange:
    """Where an image or video stands at a resolution: tokens [start, stop) with the marks around it."""

    start: int
    stop: int
    tokens: int  # of them, placeholders
    rows: int  # of pixels
    length: int  # of them, the image's own: placeholders and what stands among them


def _fitted(
    policy: str, measure: Measure, images: Sized, bounds: tuple[int, int], sequence_length: int, visual_limit: int
) -> list[Fitted]:
    """The items that a too long sample becomes; empty: it cannot be helped by this policy."""
    if policy == "reduce_resolution":
        return _reduced(measure, images, bounds, sequence_length, visual_limit)
    ranges = visual_ranges(measure, images, bounds)
    total = measure.length(images.sizes, bounds, images.family)
    if policy == "truncate_text":
        stop = _outside_images(min(sequence_length, total), ranges, 0)
        kept = _piece(0, stop, ranges)
        return [kept] if stop > 1 and kept[1] <= visual_limit else []
    if measure.coordinates or not measure.cuts:
        return []  # conversations are never split; a document with coordinates has no fixed places to cut
    pieces = split_points(total, ranges, _cut_tokens(measure, ranges), sequence_length)
    made = [_piece(start, stop, ranges) for start, stop in pairwise(pieces)]
    return made if all(piece[0] <= sequence_length and piece[1] <= visual_limit for piece in made) else []


def visual_ranges(measure: Measure, images: Sized, bounds: tuple[int, int]) -> list[VisualRange]:
    """The images with the marks around them, in order, at a resolution."""
    family, ranges, shown = images.family.among(len(images.sizes)), [], 0
    longer = _longer_coordinates(measure, images, bounds)
    for number, (image, frames, place, coordinates) in enumerate(measure.visuals):
        view, pairs = family.view(*images.sizes[image], bounds), int(family.frame_pairs(frames))
        length, start = pairs * view.length, place + shown + sum(longer[:coordinates])
        stop = start + length + len(family.after)
        rows = int(family.video_rows(frames)) * view.rows
        ranges.append(VisualRange(start - family.heading_tokens(number), stop, pairs * view.tokens, rows, length))
        shown += length
    return ranges


def _longer_coordinates(measure: Measure, images: Sized, bounds: tuple[int, int]) -> list[int]:
    """Of each coordinate the tokens that it has beyond the one that a measure's places count."""
    family, longer = images.family.among(len(images.sizes)), []
    for image, axis, value in measure.coordinates:
        size = images.sizes[image]
        number = family.coordinate(value, axis, size, family.view(*size, bounds))
        longer.append(int(family.coordinate_tokens(np.asarray([number]))[0]) - 1)
    return longer


def _first_target(measure: Measure, images: Sized, bounds: tuple[int, int]) -> int:
    """The token of a sample that is its first target; a large number where it has none."""
    place, visuals, coordinates = measure.first_target
    if place < 0:
        return 2**31
    shown = sum(visual.length for visual in visual_ranges(measure, images, bounds)[:visuals])
    return max(1, place + shown + sum(_longer_coordinates(measure, images, bounds)[:coordinates]))


def _cut_tokens(measure: Measure, ranges: list[VisualRange]) -> list[int]:
    """`measure.cuts` in tokens at this resolution."""
    cuts, shown, number = [], 0, 0
    for cut in measure.cuts:
        while number < len(ranges) and measure.visuals[number][2] < cut:
            shown += ranges[number].length
            number += 1
        cuts.append(cut + shown)
    return cuts


def split_points(total: int, ranges: list[VisualRange], cuts: list[int], limit: int) -> list[int]:
    """Where a document of `total` tokens is cut into pieces of at most `limit`: [0, ..., total].

    At the last line end or image end that fits; where none lies in the second half of the piece, between two tokens;
    never inside an image (then the piece may pass `limit`, and the caller refuses the document).
    """
    points = [0]
    while total - points[-1] > limit:
        furthest = points[-1] + limit
        good = [cut for cut in cuts if points[-1] + limit // 2 < cut <= furthest]
        point = good[-1] if good else _outside_images(furthest, ranges, points[-1])
        if point <= points[-1]:
            point = next(image.stop for image in ranges if image.start <= points[-1] < image.stop)
        points.append(point)
    return [*points, total]


def _outside_images(token: int, ranges: list[VisualRange], lowest: int) -> int:
    for image in ranges:
        if image.start < token < image.stop:
            return max(image.start, lowest)
    return token


def _piece(start: int, stop: int, ranges: list[VisualRange]) -> Fitted:
    inside = [image for image in ranges if start <= image.start and image.stop <= stop]
    return stop - start, sum(image.tokens for image in inside), sum(image.rows for image in inside), 0, start, stop


def _reduced(measure: Measure, images: Sized, bounds: tuple[int, int], sequence_length: int, visual_limit: int) -> list[Fitted]:
    """The highest resolution, by halving intervals of the pixel limit, at which the sample fits."""
    family = images.family
    lowest, highest = family.fewest_pixels, bounds[1]

    def size_at(limit: int) -> tuple[int, int, int]:
        limits = (min(bounds[0], limit), limit)
        ranges = visual_ranges(measure, images, limits)
        length = measure.length(images.sizes, limits, family)
        return length, sum(image.tokens for image in ranges), sum(image.rows for image in ranges)

    def fits(limit: int) -> bool:
        length, visual, _ = size_at(limit)
        return length <= sequence_length and visual <= visual_limit

    if not measure.visuals or not fits(lowest):
        return []
    while highest - lowest > family.unit:
        middle = (lowest + highest) // 2
        lowest, highest = (middle, highest) if fits(middle) else (lowest, middle)
    return [(*size_at(lowest), lowest, 0, -1)]
