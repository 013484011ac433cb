"""LLaVA-NeXT's tiles: the canvas that shows most of a picture, the picture in its middle, and which features are not padding.

Pure arithmetic on sizes; floats are computed exactly as transformers does, so that both choose the same canvas at every size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from terrace.families.interface import Picture

Canvases = tuple[tuple[int, int], ...]  # (height, width) in pixels


@lru_cache(maxsize=65536)
def best_canvas(width: int, height: int, canvases: Canvases) -> tuple[int, int]:
    """(height, width) of the canvas with the most pixels of the picture, and of equal ones with the least waste.

    Raises ValueError for a picture that would have no pixel on any.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    best, most, least = None, 0, math.inf
    for high, wide in canvases:
        scale = min(wide / width, high / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = high * wide - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (high, wide), shown, wasted
    if best is None:
        raise ValueError(f"an image of {width}x{height} pixels is too thin for every canvas of `image_grid_pinpoints`")
    return best


def fitted_size(width: int, height: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the picture on its canvas, its aspect kept."""
    across, down = canvas[1] / width, canvas[0] / height
    if across < down:
        return min(math.ceil(height * across), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * down), canvas[1])


def shown_features(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of `rows` x `columns` features that show the picture and not the padding around it."""
    if width / height > columns / rows:
        shown = int(round(height * (columns / width), 7))
        return rows - 2 * ((rows - shown) // 2), columns
    shown = int(round(width * (rows / height), 7))
    return rows, columns - 2 * ((columns - shown) // 2)


def laid_on_canvas(picture: Picture, canvas: tuple[int, int]) -> np.ndarray:
    """uint8 [3, H, W]: the resized picture in the middle of a black canvas."""
    size = fitted_size(picture.width, picture.height, canvas)
    planes = np.zeros((3, *canvas), np.uint8)
    top, left = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
    planes[:, top : top + size[0], left : left + size[1]] = picture.planes(*size)
    return planes


def canvases_of(pinpoints: Sequence[Sequence[int]] | None, default: Canvases) -> Canvases:
    """`image_grid_pinpoints` of a configuration."""
    return default if pinpoints is None else tuple((int(high), int(wide)) for high, wide in pinpoints)
