"""Resize arithmetic: from an image's size to its grid, its tokens and the place of its coordinates. Pure integers and floats.

This one module decides how large an image is for the model. Training, rollouts, evaluation and the index all ask it, so the
token length known from the index is the length that the packed sample really has. `smart_resize` gives exactly the sizes of
transformers' Qwen2-VL image processor; the vectorised form gives the same numbers for a whole index (4 million images per
second) and is tested against the scalar one.

`pixels` is a pair (min, max) or anything with fields `min` and `max`, for example a stage's `Pixels`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from terrace.data.types import GRID_PIXELS, PATCH_SIZE

MAX_ASPECT_RATIO = 200  # transformers refuses longer images


def pixel_bounds(pixels: Any) -> tuple[int, int]:
    """(min, max) pixels of a resized image, from a pair or from an object with `min` and `max`."""
    if hasattr(pixels, "min") and hasattr(pixels, "max"):
        return int(pixels.min), int(pixels.max)
    smallest, largest = pixels
    return int(smallest), int(largest)


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) after resizing: multiples of 28, pixels within bounds where a grid allows it, aspect nearly kept.

    Raises ValueError for an empty image or an aspect ratio above 200, like the published processor.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"aspect ratio of {width}x{height} is above {MAX_ASPECT_RATIO}")
    new_height = round(height / GRID_PIXELS) * GRID_PIXELS
    new_width = round(width / GRID_PIXELS) * GRID_PIXELS
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(GRID_PIXELS, math.floor(height / shrink / GRID_PIXELS) * GRID_PIXELS)
        new_width = max(GRID_PIXELS, math.floor(width / shrink / GRID_PIXELS) * GRID_PIXELS)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / GRID_PIXELS) * GRID_PIXELS
        new_width = math.ceil(width * grow / GRID_PIXELS) * GRID_PIXELS
    return new_height, new_width


def smart_resize_many(heights: np.ndarray, widths: np.ndarray, pixels: Any) -> tuple[np.ndarray, np.ndarray]:
    """`smart_resize` of many images: int32 [I] heights and widths. The caller has refused empty and overlong images."""
    min_pixels, max_pixels = pixel_bounds(pixels)
    height, width = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    area = height * width
    # np.rint rounds halves to even like Python's round; every product is below 2^53, so float64 is exact here.
    new_height, new_width = np.rint(height / GRID_PIXELS), np.rint(width / GRID_PIXELS)
    new_area = new_height * new_width * GRID_PIXELS**2
    above, below = new_area > max_pixels, new_area < min_pixels
    shrink, grow = np.sqrt(area / max_pixels), np.sqrt(min_pixels / np.maximum(area, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        smaller_height = np.maximum(1, np.floor(height / shrink / GRID_PIXELS))
        smaller_width = np.maximum(1, np.floor(width / shrink / GRID_PIXELS))
    larger_height, larger_width = np.ceil(height * grow / GRID_PIXELS), np.ceil(width * grow / GRID_PIXELS)
    new_height = np.where(above, smaller_height, np.where(below, larger_height, new_height))
    new_width = np.where(above, smaller_width, np.where(below, larger_width, new_width))
    return (new_height * GRID_PIXELS).astype(np.int32), (new_width * GRID_PIXELS).astype(np.int32)


def resized_grid(height: int, width: int, pixels: Any) -> tuple[int, int]:
    """(rows, columns) of 14x14 patches of the resized image."""
    new_height, new_width = smart_resize(height, width, *pixel_bounds(pixels))
    return new_height // PATCH_SIZE, new_width // PATCH_SIZE


def visual_tokens(height: int, width: int, pixels: Any) -> int:
    """Image tokens of an image of this original size: one per 28x28 pixels of the resized image."""
    new_height, new_width = smart_resize(height, width, *pixel_bounds(pixels))
    return (new_height // GRID_PIXELS) * (new_width // GRID_PIXELS)


def resized_coordinate(value: float, original: int, resized: int) -> int:
    """A coordinate of the original image in whole pixels of the resized one, clamped to [0, resized - 1].

    `original` and `resized` are the two widths for an x, the two heights for a y. The formula is that of Qwen2.5-VL's own
    data preparation: round(value * scale), halves to even.
    """
    return max(0, min(round(value * (resized / original)), resized - 1))


def resized_coordinate_many(values: np.ndarray, originals: np.ndarray, resized: np.ndarray) -> np.ndarray:
    """`resized_coordinate` of many coordinates: int64 [C]."""
    scaled = np.rint(np.asarray(values, np.float64) * (np.asarray(resized, np.float64) / originals))
    return np.clip(scaled, 0, np.asarray(resized, np.float64) - 1).astype(np.int64)
