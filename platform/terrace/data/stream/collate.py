"""Pack specification plus sample bytes to the packed example that the model reads. The same bytes on any machine.

Every length was known from the index; a sample that encodes to another one means that tokenizer, template or data
changed since, and stops the stage by name rather than shifting every later token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from terrace.data.images import ImageDamage, load_pixels
from terrace.data.template import Encoded, encode_sample
from terrace.data.tokenizer import TextTokenizer
from terrace.data.types import PackedExample, PackSpec, Sample, SampleRef
from terrace.errors import DamagedData, InputError
from terrace.families.interface import Family, View

NO_TARGET = -100


@dataclass(frozen=True)
class CollateSettings:
    """What a stage says about reading a sample; small, travels with every task."""

    tokenizer_dir: str
    family: Family
    pixels: tuple[int, int]
    sequence_length: int
    max_image_pixels: int
    supervise: Mapping[str, str]  # per source
    skip_damaged: frozenset[str]  # sources with `on_damage: skip`


@dataclass(frozen=True)
class LoadedSample:
    """A sample as read from its shard: its images' bytes and their original (width, height), in image order."""

    sample: Sample
    images: Sequence[bytes]
    sizes: Sequence[tuple[int, int]]


Replacements = Callable[[int], Iterator[tuple[PackSpec, LoadedSample]]]  # place in the pack -> one-sample packs, best first


@dataclass(frozen=True)
class Segment:
    """One sample ready to stand in a pack."""

    encoded: Encoded
    targets: np.ndarray  # int32 [L]
    pixels: list[np.ndarray]  # uint8 [R_i, values of a row], one of each image or video


def collate(
    spec: PackSpec,
    samples: Sequence[LoadedSample | DamagedData],
    tokenizer: TextTokenizer,
    settings: CollateSettings,
    replacements: Replacements | None = None,
) -> PackedExample:
    """Build the pack of `spec` from its samples, in order.

    Raises DamagedData, naming source and sample, for bytes that cannot be used. Of a source with `on_damage: skip` the
    pack names the sample in `damaged` instead, and the first of `replacements(place)` that can be read stands there; a
    place without any is left out.
    """
    family = settings.family
    room = PixelRoom(spec.pixel_rows, family.row_values)
    segments: list[Segment] = []
    refs: list[SampleRef] = []
    kinds: list[str] = []
    damaged: list[str] = []
    epochs: list[int] = []
    replaced = 0
    for number, (ref, loaded) in enumerate(zip(spec.samples, samples)):
        used = room.used
        try:
            if isinstance(loaded, DamagedData):
                raise loaded
            segment, kind = make_segment(spec, number, loaded, tokenizer, settings, room), loaded.sample.kind
        except DamagedData:
            if ref.source not in settings.skip_damaged:
                raise
            room.used = used
            damaged.append(f"{ref.source}/{ref.id}")
            found = _first_readable(replacements(number) if replacements else iter(()), refs, tokenizer, settings, room)
            if found is None:
                continue
            ref, segment, kind = found
            replaced += 1
        segments.append(segment)
        refs.append(ref)
        kinds.append(kind)
        epochs += spec.epochs[number : number + 1]
    lengths = [len(segment.encoded.input_ids) for segment in segments]
    pixels = [part for segment in segments for part in segment.pixels]
    visuals = [visual for segment in segments for visual in segment.encoded.visuals]
    return PackedExample(
        pack=spec.pack,
        input_ids=_joined([segment.encoded.input_ids for segment in segments], (0,), np.int32),
        targets=_joined([segment.targets for segment in segments], (0,), np.int32),
        position_ids=_joined([segment.encoded.positions for segment in segments], (family.position_rows, 0), np.int32, axis=1),
        segment_ends=np.cumsum(lengths, dtype=np.int32) if lengths else np.empty(0, dtype=np.int32),
        pixels=room.joined(pixels),
        image_facts=np.asarray([visual.facts for visual in visuals], np.int32).reshape(-1, family.fact_count),
        image_tokens=np.asarray([visual.tokens for visual in visuals], np.int32),
        image_rows=np.asarray([len(part) for part in pixels], np.int32),
        sample_ids=[ref.id for ref in refs],
        sources=[ref.source for ref in refs],
        kinds=kinds,
        sequence_length=settings.sequence_length,
        damaged=tuple(damaged),
        replaced=replaced,
        epochs=np.asarray(epochs, np.int32),
    )


def _first_readable(
    candidates: Iterator[tuple[PackSpec, LoadedSample]],
    taken: list[SampleRef],
    tokenizer: TextTokenizer,
    settings: CollateSettings,
    room: PixelRoom,
) -> tuple[SampleRef, Segment, str] | None:
    """(reference, segment, kind) of the first candidate that can be decoded and is not in the pack yet."""
    used = room.used
    for alone, loaded in candidates:
        if alone.samples[0] in taken:
            continue
        try:
            return alone.samples[0], make_segment(alone, 0, loaded, tokenizer, settings, room), loaded.sample.kind
        except DamagedData:
            room.used = used
    return None


def make_segment(
    spec: PackSpec,
    number: int,
    loaded: LoadedSample,
    tokenizer: TextTokenizer,
    settings: CollateSettings,
    room: PixelRoom | None = None,
) -> Segment:
    """Encode, decode and cut one sample of a pack as its specification says; pixels go straight into `room`."""
    ref = spec.samples[number]
    bounds = spec.bounds(number, settings.pixels)
    supervise = settings.supervise.get(ref.source, "auto")
    try:
        encoded = encode_sample(loaded.sample, loaded.sizes, tokenizer, settings.family, bounds, supervise)
    except InputError as error:
        raise DamagedData(f"source {ref.source}, sample {ref.id}: {error}") from error
    span = spec.spans[number] if spec.spans else None
    if span is not None:
        encoded = cut_encoded(encoded, span, settings.family)
    if len(encoded.input_ids) != spec.lengths[number]:
        raise DamagedData(
            f"source {ref.source}, sample {ref.id}: it has {len(encoded.input_ids)} tokens where the index says"
            f" {spec.lengths[number]}; the tokenizer or the data changed since it was indexed: index it again"
        )
    targets = np.full(len(encoded.input_ids), NO_TARGET, dtype=np.int32)
    targets[:-1] = np.where(encoded.supervised[1:], encoded.input_ids[1:], NO_TARGET)
    pixels = [image_pixels(loaded, images, view, settings, ref, room) for images, view in zip(encoded.images, encoded.views)]
    return Segment(encoded, targets, pixels)


def image_pixels(
    loaded: LoadedSample, images: Sequence[int], view: View, settings: CollateSettings, ref: SampleRef,
    room: PixelRoom | None = None,
) -> np.ndarray:
    """Rows of one image, or of a video whose frames are `images`. DamagedData, naming the image, where it cannot be decoded."""
    video, frames = len(images) > 1, []
    for image in images:
        try:
            place = room.take(view.rows) if room and not video else None
            frames.append(load_pixels(loaded.images[image], settings.family, view, settings.max_image_pixels, place))
        except ImageDamage as error:
            raise DamagedData(f"source {ref.source}, sample {ref.id}, image {image}: {error}") from error
    return settings.family.video_pixels(frames) if video else frames[0]


class PixelRoom:
    """The pixels of a pack in one array, which decoding writes into: joining them later would copy every one once more."""

    def __init__(self, rows: int, row_values: int):
        self._rows = np.empty((rows, row_values), np.uint8)
        self.used = 0

    def take(self, rows: int) -> np.ndarray | None:
        """The next `rows` of it, or None where it is full."""
        if self.used + rows > len(self._rows):
            return None
        self.used += rows
        return self._rows[self.used - rows : self.used]

    def joined(self, parts: list[np.ndarray]) -> np.ndarray:
        """uint8 [R, values] of all parts in order. They are copied only where one lies elsewhere (a video's pairs of frames)."""
        if all(part.base is self._rows for part in parts) and self.used == sum(map(len, parts)):
            return self._rows[: self.used]
        return _joined(parts, (0, self._rows.shape[1]), np.uint8)


def cut_encoded(encoded: Encoded, span: tuple[int, int], family: Family) -> Encoded:
    """The token range of an encoded sample as a segment of its own: positions restart, other images are dropped."""
    start, stop = span
    kept = [
        (replace(visual, start=visual.start - start), view, images)
        for visual, view, images in zip(encoded.visuals, encoded.views, encoded.images)
        if start <= visual.start and visual.start + visual.length <= stop
    ]
    visuals, views, images = zip(*kept) if kept else ((), (), ())
    ids = encoded.input_ids[start:stop].copy()
    if family.keeps_end:
        ids[-1] = encoded.input_ids[-1]
    return Encoded(
        input_ids=ids,
        supervised=encoded.supervised[start:stop],
        positions=family.positions(stop - start, visuals),
        visuals=visuals,
        views=views,
        images=images,
    )


def _joined(parts: list[np.ndarray], empty_shape: tuple[int, ...], dtype: type, axis: int = 0) -> np.ndarray:
    if not parts:
        return np.empty(empty_shape, dtype=dtype)
    return np.ascontiguousarray(np.concatenate(parts, axis=axis), dtype=dtype)
