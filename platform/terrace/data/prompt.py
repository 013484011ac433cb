"""A sample up to its answer, read as the model reads it: token ids, positions and pixels. Rollouts, rewards and evaluation share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from terrace.data.images import DEFAULT_MAX_IMAGE_PIXELS, load_pixels
from terrace.data.template import Encoded, encode_observation, encode_prompt
from terrace.data.tokenizer import TextTokenizer
from terrace.data.types import PromptInputs, Sample, no_pixels
from terrace.families.interface import Bounds, Family


@dataclass(frozen=True)
class ReadPrompt:
    """What `read_prompt` found: the inputs, and per image of the sample the (width, height) in which coordinates are written."""

    inputs: PromptInputs
    encoded: Encoded
    scales: dict[int, tuple[int, int]]


def measured_prompt(
    sample: Sample, sizes: Sequence[tuple[int, int]], tokenizer: TextTokenizer, family: Family, bounds: Bounds
) -> tuple[Encoded, dict[int, tuple[int, int]]]:
    """The prompt's tokens and `ReadPrompt.scales`, from the sizes alone: no image is opened. All frames of a video have its scale."""
    encoded = encode_prompt(sample, sizes, tokenizer, family, bounds)
    views = [(number, view) for numbers, view in zip(encoded.images, encoded.views) for number in numbers]
    return encoded, {number: (view.scale[1], view.scale[0]) for number, view in views}


def read_prompt(
    sample: Sample, images: Sequence[bytes], sizes: Sequence[tuple[int, int]], tokenizer: TextTokenizer, family: Family,
    bounds: Bounds, max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
) -> ReadPrompt:
    """Encode the sample's prompt and cut its images and frames. Raises ImageDamage for a broken one, InputError for a sample that
    cannot be read."""
    encoded, scales = measured_prompt(sample, sizes, tokenizer, family, bounds)
    return ReadPrompt(_inputs(encoded, images, family, max_image_pixels), encoded, scales)


def read_observation(
    sample: Sample, images: Sequence[bytes], sizes: Sequence[tuple[int, int]], tokenizer: TextTokenizer, family: Family,
    bounds: Bounds, following: np.ndarray, max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
) -> PromptInputs:
    """The turns behind the conversation's last answer, up to the header of the next one. `following`: int64 [P], the positions of the
    first token behind that answer; `images` and `sizes` are those of the whole conversation."""
    encoded = encode_observation(sample, sizes, tokenizer, family, bounds)
    inputs = _inputs(encoded, images, family, max_image_pixels)
    return replace(inputs, positions=(inputs.positions + following[:, None]).astype(np.int32))


def _inputs(encoded: Encoded, images: Sequence[bytes], family: Family, max_image_pixels: int) -> PromptInputs:
    pixels = []
    for numbers, view in zip(encoded.images, encoded.views):
        frames = [load_pixels(images[number], family, view, max_image_pixels) for number in numbers]
        pixels.append(frames[0] if len(frames) == 1 else family.video_pixels(frames))
    fields = no_pixels(family.row_values, family.fact_count)
    if pixels:
        fields = {
            "pixels": np.concatenate(pixels), "image_facts": encoded.facts,
            "image_tokens": np.asarray([visual.tokens for visual in encoded.visuals], np.int32),
            "image_rows": np.asarray([len(rows) for rows in pixels], np.int32),
        }  # fmt: skip
    videos = sum(visual.seconds is not None for visual in encoded.visuals)
    return PromptInputs(encoded.input_ids, encoded.positions, **fields, videos=videos)
