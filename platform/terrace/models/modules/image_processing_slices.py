"""Pictures as an overview and slices at their own aspect, or as one square, cut into patches: what an export's processor loads."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .slicing import sliced  # families/slicing.py, which an export puts beside this file


class SliceImageProcessor(BaseImageProcessor):
    """`scale`: the side in pixels of the square, or of a square slice; `most_slices` of them at most; the rest as in `pictures`."""

    model_input_names = ["pixel_values", "target_sizes"]  # noqa: RUF012

    def __init__(
        self, scale: int = 448, most_slices: int = 9, patch_size: int = 14, sides: str = "nearest", overview: str = "first",
        layout: str = "slices", image_mean: list[float] | None = None, image_std: list[float] | None = None, **others: Any,
    ) -> None:
        super().__init__(**others)
        self.scale, self.most_slices, self.patch_size, self.sides, self.overview = scale, most_slices, patch_size, sides, overview
        self.layout = layout
        self.image_mean, self.image_std = image_mean or [0.5] * 3, image_std or [0.5] * 3

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """`pixel_values` [1, 3, patch, patch * patches], and `target_sizes` [pictures, 2], rows and columns of each in patches."""
        mean, std = np.float32(self.image_mean)[:, None, None], np.float32(self.image_std)[:, None, None]
        strips: list[np.ndarray] = []
        sizes: list[tuple[int, int]] = []
        for image in images if isinstance(images, list | tuple) else [images]:
            image = (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")
            for picture in self._pictures(image):
                sizes.append((picture.shape[1] // self.patch_size, picture.shape[2] // self.patch_size))
                strips += np.split(picture, sizes[-1][0], axis=1)  # rows of patches
        values = (np.concatenate(strips, axis=2).astype(np.float32) / 255 - mean) / std
        return BatchFeature({"pixel_values": values[None], "target_sizes": np.asarray(sizes)}, tensor_type=return_tensors)

    def _pictures(self, image: Image.Image) -> list[np.ndarray]:
        if self.layout == "square":
            return [_planes(image, self.scale, self.scale)]
        size = (*image.size, self.scale, self.patch_size, self.most_slices, self.sides == "nearest")
        (rows, columns), overview, (high, wide) = sliced(*size)
        slices: list[np.ndarray] = []
        if rows:
            whole = _planes(image, rows * high, columns * wide).reshape(3, rows, high, columns, wide).transpose(1, 3, 0, 2, 4)
            slices = [*whole.reshape(-1, 3, high, wide)]
        return [_planes(image, *overview), *slices] if self.overview == "first" else [*slices, _planes(image, *overview)]


def _planes(image: Image.Image, height: int, width: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
