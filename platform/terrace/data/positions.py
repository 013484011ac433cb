"""M-RoPE positions of one sample, equal to transformers' `Qwen2_5_VLModel.get_rope_index`.

A text token has the same t, h and w. An image's tokens share one t and count rows and columns from where the text
stopped; the text goes on after the longer side. A video's tokens advance t by seconds times `tokens_per_second`.
Positions restart for every sample of a pack; row 0 holds plain text positions, from which attention derives segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from terrace.data.types import MERGE_SIZE

TEMPORAL_PATCH_SIZE = 2  # frames of one temporal patch
TOKENS_PER_SECOND = 2.0  # of Qwen2.5-VL's published configurations


@dataclass(frozen=True)
class Visual:
    """The pad tokens of one image or video: where they start, and its grid (t, h, w) in 14-pixel patches.

    `seconds` is None for an image; for a video it is the time of each temporal patch, from the first one.
    """

    start: int
    grid: tuple[int, int, int]
    seconds: tuple[float, ...] | None = None

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] // MERGE_SIZE**2


def temporal_seconds(timestamps: Sequence[float]) -> tuple[float, ...]:
    """Seconds of each temporal patch (a pair of frames; an odd last frame is doubled) from the video's first frame."""
    return tuple(float(second) - float(timestamps[0]) for second in timestamps[::TEMPORAL_PATCH_SIZE])


def rope_positions(length: int, visuals: Sequence[Visual], tokens_per_second: float = TOKENS_PER_SECOND) -> np.ndarray:
    """Positions of a sample of `length` tokens: int32 [4, length]: text position, then t, h, w."""
    positions = np.empty((4, length), dtype=np.int32)
    positions[0] = np.arange(length)
    token, position = 0, 0
    for visual in visuals:
        positions[1:, token : visual.start] = np.arange(position, position + visual.start - token)
        position += visual.start - token
        frames, rows, columns = visual.grid[0], visual.grid[1] // MERGE_SIZE, visual.grid[2] // MERGE_SIZE
        # float32, as transformers multiplies before it cuts to whole positions
        interval = np.asarray(visual.seconds or range(frames), dtype=np.float32)
        steps = (interval * np.float32(tokens_per_second if visual.seconds else 1.0)).astype(np.int32)
        end = visual.start + frames * rows * columns
        block = positions[1:, visual.start : end].reshape(3, frames, rows, columns)
        block[0] = steps[:, None, None]
        block[1] = np.arange(rows)[None, :, None]
        block[2] = np.arange(columns)[None, None, :]
        positions[1:, visual.start : end] = block.reshape(3, -1) + position
        position += max(rows, columns)
        token = end
    positions[1:, token:] = np.arange(position, position + length - token)
    return positions
