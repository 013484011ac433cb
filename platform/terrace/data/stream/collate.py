"""Pack specification plus sample bytes to the packed example that the model reads. The same bytes on any machine.

Every length was known from the index; a sample that encodes to another one means that tokenizer, template or data
changed since, and stops the stage by name rather than shifting every later token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from terrace.data.images import ImageDamage, load_patches
from terrace.data.positions import TEMPORAL_PATCH_SIZE, Visual, rope_positions, temporal_seconds
from terrace.data.template import Encoded, encode_sample
from terrace.data.tokenizer import TextTokenizer
from terrace.data.types import MERGE_SIZE, PATCH_SIZE, PATCH_VALUES, PackedExample, PackSpec, Sample, SampleRef
from terrace.errors import DamagedData, InputError

NO_TARGET = -100


@dataclass(frozen=True)
class CollateSettings:
    """What a stage says about reading a sample; small, travels with every task."""

    tokenizer_dir: str
    pixels: tuple[int, int]
    sequence_length: int
    max_image_pixels: int
    supervise: Mapping[str, str]  # per source
    skip_damaged: frozenset[str]  # sources with `on_damage: skip`
    tokens_per_second: float


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
    patches: list[np.ndarray]  # uint8 [P_i, 588] each
    videos: list[bool]  # per grid


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
    room = PatchRoom(spec.patches)
    segments: list[Segment] = []
    refs: list[SampleRef] = []
    kinds: list[str] = []
    damaged: list[str] = []
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
    lengths = [len(segment.encoded.input_ids) for segment in segments]
    videos = [flag for segment in segments for flag in segment.videos]
    return PackedExample(
        pack=spec.pack,
        input_ids=_joined([segment.encoded.input_ids for segment in segments], (0,), np.int32),
        targets=_joined([segment.targets for segment in segments], (0,), np.int32),
        position_ids=_joined([segment.encoded.positions for segment in segments], (4, 0), np.int32, axis=1),
        segment_ends=np.cumsum(lengths, dtype=np.int32) if lengths else np.empty(0, dtype=np.int32),
        patches=room.joined([part for segment in segments for part in segment.patches]),
        image_grids=_joined([segment.encoded.grids for segment in segments], (0, 3), np.int32),
        sample_ids=[ref.id for ref in refs],
        sources=[ref.source for ref in refs],
        kinds=kinds,
        sequence_length=settings.sequence_length,
        video_grids=tuple(place for place, flag in enumerate(videos) if flag),
        damaged=tuple(damaged),
        replaced=replaced,
    )


def _first_readable(
    candidates: Iterator[tuple[PackSpec, LoadedSample]],
    taken: list[SampleRef],
    tokenizer: TextTokenizer,
    settings: CollateSettings,
    room: PatchRoom,
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
    room: PatchRoom | None = None,
) -> Segment:
    """Encode, decode and cut one sample of a pack as its specification says; patches go straight into `room`."""
    ref = spec.samples[number]
    limit = spec.pixels_max[number] if spec.pixels_max else 0
    pixels = (min(settings.pixels[0], limit), limit) if limit else settings.pixels
    supervise = settings.supervise.get(ref.source, "auto")
    try:
        encoded = encode_sample(loaded.sample, loaded.sizes, tokenizer, pixels, supervise, settings.tokens_per_second)
    except InputError as error:
        raise DamagedData(f"source {ref.source}, sample {ref.id}: {error}") from error
    span = spec.spans[number] if spec.spans else None
    if span is not None:
        encoded = cut_encoded(encoded, span, loaded.sample, tokenizer, settings.tokens_per_second)
    if len(encoded.input_ids) != spec.lengths[number]:
        raise DamagedData(
            f"source {ref.source}, sample {ref.id}: it has {len(encoded.input_ids)} tokens where the index says"
            f" {spec.lengths[number]}; the tokenizer or the data changed since it was indexed: index it again"
        )
    targets = np.full(len(encoded.input_ids), NO_TARGET, dtype=np.int32)
    targets[:-1] = np.where(encoded.supervised[1:], encoded.input_ids[1:], NO_TARGET)
    patches = []
    for grid, images in zip(encoded.grids.tolist(), encoded.images):
        height, width = grid[1] * PATCH_SIZE, grid[2] * PATCH_SIZE
        video = _is_video(grid, images)
        frames = []
        for image in images:
            try:
                place = room.take(grid[1] * grid[2]) if room and not video else None
                frames.append(load_patches(loaded.images[image], height, width, settings.max_image_pixels, place))
            except ImageDamage as error:
                raise DamagedData(f"source {ref.source}, sample {ref.id}, image {image}: {error}") from error
        patches += [_paired(frames)] if video else frames
    videos = [_is_video(grid, images) for grid, images in zip(encoded.grids.tolist(), encoded.images)]
    return Segment(encoded, targets, patches, videos)


class PatchRoom:
    """The patches of a pack in one array, which decoding writes into: joining them later would copy every pixel once more."""

    def __init__(self, rows: int):
        self._rows = np.empty((rows, PATCH_VALUES), np.uint8)
        self.used = 0

    def take(self, rows: int) -> np.ndarray | None:
        """The next `rows` of it, or None where it is full."""
        if self.used + rows > len(self._rows):
            return None
        self.used += rows
        return self._rows[self.used - rows : self.used]

    def joined(self, parts: list[np.ndarray]) -> np.ndarray:
        """uint8 [P, 588] of all parts in order. They are copied only where one lies elsewhere (a video's pairs of frames)."""
        if all(part.base is self._rows for part in parts) and self.used == sum(map(len, parts)):
            return self._rows[: self.used]
        return _joined(parts, (0, PATCH_VALUES), np.uint8)


def cut_encoded(
    encoded: Encoded, span: tuple[int, int], sample: Sample, tokenizer: TextTokenizer, tokens_per_second: float
) -> Encoded:
    """The token range of an encoded sample as a segment of its own: positions restart, other images are dropped."""
    start, stop = span
    pads = (encoded.input_ids == tokenizer.special.image_pad) | (encoded.input_ids == tokenizer.special.video_pad)
    pad_places = np.flatnonzero(pads)
    items = [item for message in sample.messages for item in message["content"]]
    stamps = [item["timestamps"] for item in items if item["type"] == "video"]
    visuals, grids, images, seen = [], [], [], 0
    for grid, numbers in zip(encoded.grids.tolist(), encoded.images):
        tokens = grid[0] * grid[1] * grid[2] // MERGE_SIZE**2
        first = int(pad_places[seen])
        seconds = temporal_seconds(stamps.pop(0)) if encoded.input_ids[first] == tokenizer.special.video_pad else None
        seen += tokens
        if start <= first and first + tokens <= stop:
            visuals.append(Visual(first - start, tuple(grid), seconds))
            grids.append(grid)
            images.append(numbers)
    return Encoded(
        input_ids=encoded.input_ids[start:stop],
        supervised=encoded.supervised[start:stop],
        grids=np.asarray(grids, dtype=np.int32).reshape(-1, 3),
        positions=rope_positions(stop - start, visuals, tokens_per_second),
        images=tuple(images),
    )


def _is_video(grid: Sequence[int], images: Sequence[int]) -> bool:
    return len(images) > 1 or grid[0] > 1


def _paired(frames: list[np.ndarray]) -> np.ndarray:
    """Frames of a video (uint8 [P, 588] each) as temporal patches: rows 2k and 2k + 1 are the two frames of patch k."""
    if len(frames) % TEMPORAL_PATCH_SIZE:
        frames = [*frames, frames[-1]]
    pairs = [np.stack(frames[at : at + 2], axis=1) for at in range(0, len(frames), TEMPORAL_PATCH_SIZE)]
    return np.concatenate(pairs).reshape(-1, PATCH_VALUES)


def _joined(parts: list[np.ndarray], empty_shape: tuple[int, ...], dtype: type, axis: int = 0) -> np.ndarray:
    if not parts:
        return np.empty(empty_shape, dtype=dtype)
    return np.ascontiguousarray(np.concatenate(parts, axis=axis), dtype=dtype)
