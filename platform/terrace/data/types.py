"""The plain values that travel between the layers: sample, pack specification, packed example. Imports numpy only.

Shape letters: L tokens of a pack, S segments (samples) of a pack, I images of a pack, P 14x14 patches of a pack.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

PATCH_SIZE = 14
MERGE_SIZE = 2
GRID_PIXELS = PATCH_SIZE * MERGE_SIZE  # sides of a resized image are multiples of this
PATCH_VALUES = 3 * PATCH_SIZE * PATCH_SIZE  # uint8 values of one patch, channel-major (3, 14, 14)


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
    visual_tokens: tuple[int, ...]  # of which image tokens, after the 2x2 merge
    patches: int  # 14x14 patches over all images
    window: int  # packing window this pack came from
    pixels_max: tuple[int, ...] = ()  # per sample, when `too_long: reduce_resolution` lowered it below the stage's limit
    spans: tuple[tuple[int, int] | None, ...] = ()  # per sample, the token range kept (`split`, `truncate_text`)


@dataclass
class PackedExample:
    """One pack as the model receives it (numpy on the host; `models.batch.to_device` moves it).

    Tokens are those of the segments in order, without padding. An empty pack has L = 0.
    """

    pack: int
    input_ids: np.ndarray  # int32 [L]
    targets: np.ndarray  # int32 [L]: the token to predict at each place (already shifted within its segment), -100 where none
    position_ids: np.ndarray  # int32 [4, L]: row 0 text positions restarting per segment, rows 1-3 M-RoPE t, h, w
    segment_ends: np.ndarray  # int32 [S]: exclusive end of each segment; the segments cover [0, L)
    patches: np.ndarray  # uint8 [P, 3 * 14 * 14] channel-major, in Qwen's merge order, no temporal duplication
    image_grids: np.ndarray  # int32 [I, 3]: (t, h, w) in patches, one row per image in token order
    sample_ids: list[str]
    sources: list[str]  # source name of each segment
    kinds: list[str]  # sample kind of each segment
    sequence_length: int  # the stage's length, for the fill
    video_grids: tuple[int, ...] = ()  # rows of `image_grids` that are videos: two rows of `patches` per patch, one per frame
    damaged: tuple[str, ...] = ()  # samples that could not be read, of sources with `on_damage: skip`, as "source/id"
    replaced: int = 0  # of them, those in whose place another sample stands; the others left a gap

    @property
    def tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def supervised_tokens(self) -> int:
        return int((self.targets >= 0).sum())
