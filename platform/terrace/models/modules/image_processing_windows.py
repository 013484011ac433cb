"""Pictures as a fixed grid of windows and an overview behind them, every one a square: what an export's processor loads."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature


class WindowImageProcessor(BaseImageProcessor):
    """`window_grid`: rows and columns; `size`: height and width of a window. Pictures are stretched over the grid, bicubic."""

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self, window_grid: list[int] | None = None, size: dict[str, int] | None = None, image_mean: list[float] | None = None,
        image_std: list[float] | None = None, **others: Any,
    ) -> None:
        super().__init__(**others)
        self.window_grid, self.size = window_grid or [1, 1], size or {"height": 448, "width": 448}
        self.image_mean, self.image_std = image_mean or [0.5] * 3, image_std or [0.5] * 3

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """`pixel_values` [pictures * (windows + 1), 3, height, width]."""
        (rows, columns), high, wide = self.window_grid, self.size["height"], self.size["width"]
        mean, std = np.float32(self.image_mean)[:, None, None], np.float32(self.image_std)[:, None, None]
        squares: list[np.ndarray] = []
        for image in images if isinstance(images, list | tuple) else [images]:
            image = (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")
            whole = _planes(image, rows * high, columns * wide).reshape(3, rows, high, columns, wide).transpose(1, 3, 0, 2, 4)
            squares += [*whole.reshape(-1, 3, high, wide), _planes(image, high, wide)]
        values = (np.stack(squares).astype(np.float32) / 255 - mean) / std
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)


def _planes(image: Image.Image, height: int, width: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
