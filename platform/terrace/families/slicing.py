"""LLaVA-UHD's slicing, as MiniCPM-V has it: how many slices in which grid, and the size of each. Sizes are (height, width) in pixels."""

from __future__ import annotations

import math
from functools import lru_cache

Size = tuple[int, int]


@lru_cache(maxsize=65536)
def sliced(width: int, height: int, scale: int, unit: int, most: int, exceeding: bool = True) -> tuple[Size, Size, Size]:
    """(rows, columns) of slices, the size of the overview and that of a slice; (0, 0) twice where the picture is not sliced.

    A slice has about `scale` x `scale` pixels at its own aspect; sides are multiples of `unit`; there are at most `most` slices.
    MiniCPM-V rounds sides to the nearest multiple, so that a slice may have a little more; LLaVA-UHD (`exceeding` false) rounds them
    down, and enlarges the overview of a small picture too. Raises ValueError for an empty picture.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    grid = slice_grid(width, height, scale, most)
    if not exceeding:
        rows, columns = grid or (1, 1)
        part = _within(height // rows, width // columns, scale, unit) if grid else (0, 0)
        return grid or (0, 0), _within(height, width, scale, unit), part
    if grid is None:
        return (0, 0), _fitted(height, width, scale, unit, enlarge=True), (0, 0)
    overview = _fitted(height, width, scale, unit, enlarge=False)
    high, wide = (_multiple(side, count) / count for side, count in ((height, grid[0]), (width, grid[1])))
    return grid, overview, _fitted(high, wide, scale, unit, enlarge=True)


def slice_grid(width: int, height: int, scale: int, most: int) -> Size | None:
    """(rows, columns) with the aspect nearest to the picture's, for one slice less than its area asks for, as many, or one more.

    None for a picture that is not larger than one slice.
    """
    wanted = min(math.ceil(width * height / (scale * scale)), most)
    if wanted <= 1:
        return None
    best, least, aspect = (1, 1), math.inf, math.log(width / height)
    for count in (wanted - 1, wanted, wanted + 1):
        if not 1 < count <= most:
            continue
        for rows in (rows for rows in range(1, count + 1) if count % rows == 0):
            error = abs(aspect - math.log(count // rows / rows))
            if error < least or (error == least and rows > best[0]):
                best, least = (rows, count // rows), error
    return best


def _fitted(height: float, width: float, scale: int, unit: int, enlarge: bool) -> Size:
    if height * width > scale * scale or enlarge:
        aspect = width / height
        height = int(scale / math.sqrt(aspect))
        width = int(height * aspect)
    return _multiple(height, unit), _multiple(width, unit)


def _within(height: int, width: int, scale: int, unit: int) -> Size:
    """The largest sides in this aspect, each rounded down, whose product is `scale` x `scale` at most."""
    height, width = max(1, height), max(1, width)
    most = (scale // unit) ** 2
    factor = math.sqrt(most * unit * unit / (height * width))
    rows, columns = (max(1, min(most, math.floor(factor * side / unit))) for side in (height, width))
    return rows * unit, columns * unit


def _multiple(value: float, unit: int) -> int:
    return max(round(value / unit) * unit, unit)
