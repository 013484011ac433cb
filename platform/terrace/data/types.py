"""The plain values that travel between the layers: sample, pack specification, packed example. Imports numpy only.

Shape letters: L tokens of a pack, S segments (samples) of a pack, I images of a pack, R rows of pixels of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One training sample in canonical form, as stored in a shard's JSON member.

    `messages` is a list of `{"role": ..., "content": [item, ...]}`. Roles are system, user, assistant, or `text` for running
    text (captions, documents, plain text: exactly one message of role `text`). Items:

    - `{"type": "text", "text": str}`
    - `{"type": "image", "image": k}`: image k of this sample
    - `{"type": "box", "image": k, "box": [x1, y1, x2, y2]}`: pixels of the original image k, rendered in resized pixels
    - `{"type": "point", "image": k, "point": [x, y]}`
    - `{"type": "video", "frames": [k, ...], "timestamps": [seconds, ...]}`

    `metadata` keeps what rewards and evaluation need: task, solution, tolerance, rejected (list of items), licence, origin.
    """

    id: str
    kind: str
    messages: list[dict[str, Any]]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleRef:
    """A sample's place: source name, row of the source's index, and its id."""

    source: str
    row: int
    id: str


@dataclass(frozen=True)
class PackSpec:
    """What one pack holds, by reference: a few hundred bytes that any machine can turn into the same PackedExample."""

    pack: int  # position in the stage's sequence of packs; packs [step * batch, (step + 1) * batch) form a step
    samples: tuple[SampleRef, ...]  # empty for the padding packs that complete the last step of a `samples` or `epochs` budget
    lengths: tuple[int, ...]  # tokens of each sample, known from the index
    visual_tokens: tuple[int, ...]  # of which placeholders of images and videos
    pixel_rows: int  # over all images, in the family's form; the two frames of a video's patch count once
    window: int  # packing window this pack came from
    pixels_max: tuple[int, ...] = ()  # per sample, when `too_long: reduce_resolution` lowered it below the stage's limit
    spans: tuple[tuple[int, int] | None, ...] = ()  # per sample, the token range kept (`split`, `truncate_text`)
    epochs: tuple[int, ...] = ()  # per sample, passes over its source before this one; of objectives that draw anew in each
    pixels: tuple[int, int] | None = None  # bounds on an image's size, behind one of the stage's `changes` of resolution

    def bounds(self, number: int, stage: tuple[int, int]) -> tuple[int, int]:
        """(min, max) pixels of the images of sample `number`, where the stage's are `stage`."""
        low, high = self.pixels or stage
        limit = self.pixels_max[number] if self.pixels_max else 0
        return (min(low, limit), limit) if limit else (low, high)


@dataclass
class PackedExample:
    """One pack as the model receives it (numpy on the host; `models.batch.to_device` moves it).

    Tokens are those of the segments in order, without padding. An empty pack has L = 0.
    """

    pack: int
    input_ids: np.ndarray  # int32 [L]
    targets: np.ndarray  # int32 [L]: the token to predict at each place (already shifted within its segment), -100 where none
    position_ids: np.ndarray  # int32 [P, L], as many rows as the family has; row 0 counts tokens and restarts per segment
    segment_ends: np.ndarray  # int32 [S]: exclusive end of each segment; the segments cover [0, L)
    pixels: np.ndarray  # uint8 [R, values of a row]: patches or tiles, as the family cuts them
    image_facts: np.ndarray  # int32 [I, k]: what the device must know of each image, in token order
    image_tokens: np.ndarray  # int32 [I]: placeholders of each image
    image_rows: np.ndarray  # int32 [I]: its rows of `pixels`
    sample_ids: list[str]
    sources: list[str]  # source name of each segment
    kinds: list[str]  # sample kind of each segment
    sequence_length: int  # the stage's length, for the fill
    damaged: tuple[str, ...] = ()  # samples that could not be read, of sources with `on_damage: skip`, as "source/id"
    replaced: int = 0  # of them, those in whose place another sample stands; the others left a gap
    epochs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # int32 [S], as of `PackSpec`, where that has them

    @property
    def tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def visual_tokens(self) -> int:
        return int(self.image_tokens.sum())

    @property
    def supervised_tokens(self) -> int:
        return int((self.targets >= 0).sum())


@dataclass(frozen=True)
class PromptInputs:
    """Numpy on the host: L tokens, I images, R rows of pixels."""

    input_ids: np.ndarray  # int32 [L]
    positions: np.ndarray  # int32 [P, L]
    pixels: np.ndarray  # uint8 [R, values of a row]
    image_facts: np.ndarray  # int32 [I, k]
    image_tokens: np.ndarray  # int32 [I]
    image_rows: np.ndarray  # int32 [I]
    videos: int = 0  # of the I, those that are videos

    @property
    def next_positions(self) -> np.ndarray:
        """int64 [P]: the positions of the first token of an answer; each further one is 1 more."""
        return next_positions(self.positions)


def no_pixels(row_values: int, fact_count: int) -> dict[str, np.ndarray]:
    """The image fields of a `PackedExample` without images."""
    return {
        "pixels": np.zeros((0, row_values), np.uint8), "image_facts": np.zeros((0, fact_count), np.int32),
        "image_tokens": np.zeros(0, np.int32), "image_rows": np.zeros(0, np.int32),
    }  # fmt: skip


def joined_pixels(parts: Sequence[Any]) -> dict[str, np.ndarray]:
    """The image fields of a `PackedExample` from those of several, in order: prompts, segments (at least one)."""
    return {
        name: np.ascontiguousarray(np.concatenate([getattr(part, name) for part in parts]), np.uint8 if name == "pixels" else np.int32)
        for name in ("pixels", "image_facts", "image_tokens", "image_rows")
    }  # fmt: skip


def next_positions(positions: np.ndarray) -> np.ndarray:
    """int64 [P]: where a text goes on behind tokens with these positions [P, L]: row 0 counts tokens, the others go on
    behind the furthest of them all."""
    following = np.full(len(positions), int(positions[1:].max(initial=-1)) + 1, np.int64)
    following[0] = int(positions[0, -1]) + 1
    return following


def following_positions(positions: np.ndarray, count: int) -> np.ndarray:
    """int64 [P, count]: positions of `count` tokens behind these."""
    return next_positions(positions)[:, None] + np.arange(count)
