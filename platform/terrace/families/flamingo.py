"""Flamingo: Idefics' gated layers and resampler, and videos, whose frames are read together with learned embeddings of their times.

One placeholder stands for a video as for a picture. `video_frames` times have an embedding; a longer video has them stretched over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from terrace.families.idefics import Idefics
from terrace.families.interface import Finding, View
from terrace.families.shapes import ModelShape


class Flamingo(Idefics):
    """The fact of an image is its frames: 1, but for a video."""

    name: ClassVar[str] = "flamingo"
    marks: ClassVar[Mapping[str, str]] = {"video": "<image>", **Idefics.marks}
    token_fields: ClassVar[Mapping[str, str]] = {"image_token_id": "image"}
    videos: ClassVar[bool] = True

    def frame_pairs(self, frames: Any) -> Any:
        return np.ones_like(np.asarray(frames))

    def video_rows(self, frames: Any) -> Any:
        return np.maximum(1, np.asarray(frames))

    def video_facts(self, view: View, frames: int) -> tuple[int, ...]:
        return (frames,)

    def video_pixels(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(frames)

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        shape = super().shape(config, vocabulary)
        times = config.get("video_frames", 8) * config["vision_config"]["embed_dim"]
        return replace(shape, projector=replace(shape.projector, parameters=shape.projector.parameters + times))

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from super().check(config, trained_tokenizer)
        frames = config.get("video_frames", 8)
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            yield ("video_frames",), f"must be a number of times with an embedding, at least 1, not {frames!r}"


FAMILY = Flamingo
