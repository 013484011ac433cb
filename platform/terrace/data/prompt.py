"""A sample up to its answer, read as the model reads it: token ids, positions and pixels. Rollouts, rewards and evaluation share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from terrace.data.images import DEFAULT_MAX_IMAGE_PIXELS, load_pixels
from terrace.data.template import Encoded, encode_prompt
from terrace.data.tokenizer import TextTokenizer
from terrace.data.types import PromptInputs, Sample, no_pixels
from terrace.errors import InputError
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
    """The prompt's tokens and `ReadPrompt.scales`, from the sizes alone: no image is opened. Raises InputError for a video."""
    encoded = encode_prompt(sample, sizes, tokenizer, family, bounds)
    if any(visual.seconds is not None for visual in encoded.visuals):
        raise InputError(f"sample {sample.id}: prompts take images, not videos")
    numbers = [images_of[0] for images_of in encoded.images]
    return encoded, {number: (view.scale[1], view.scale[0]) for number, view in zip(numbers, encoded.views)}


def read_prompt(
    sample: Sample, images: Sequence[bytes], sizes: Sequence[tuple[int, int]], tokenizer: TextTokenizer, family: Family,
    bounds: Bounds, max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
) -> ReadPrompt:
    """Encode the sample's prompt and cut its images. Raises InputError for a video, ImageDamage for a broken image."""
    encoded, scales = measured_prompt(sample, sizes, tokenizer, family, bounds)
    numbers = [images_of[0] for images_of in encoded.images]
    pixels = [load_pixels(images[number], family, view, max_image_pixels) for number, view in zip(numbers, encoded.views)]
    fields = no_pixels(family.row_values, family.fact_count)
    if pixels:
        fields = {
            "pixels": np.concatenate(pixels), "image_facts": encoded.facts,
            "image_tokens": np.asarray([visual.tokens for visual in encoded.visuals], np.int32),
            "image_rows": np.asarray([len(rows) for rows in pixels], np.int32),
        }  # fmt: skip
    return ReadPrompt(PromptInputs(encoded.input_ids, encoded.positions, **fields), encoded, scales)
