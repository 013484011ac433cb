"""A picture as equal square tiles, each of them one row of pixels: what follows from a tile's side and tokens alone."""

from __future__ import annotations

import numpy as np


class EqualTiles:
    """Stands before `Family`; the family says the rest. `side`: pixels along a tile; `tokens`: placeholders of a tile."""

    side: int
    tokens: int

    @property
    def row_values(self) -> int:
        return 3 * self.side * self.side

    @property
    def unit(self) -> int:
        return self.side * self.side // self.tokens

    @property
    def shown_grid(self) -> int:
        return self.side

    @property
    def fewest_pixels(self) -> int:
        return self.side * self.side


def cut_tiles(planes: np.ndarray, side: int) -> np.ndarray:
    """uint8 [3, H, W], sides multiples of `side`, to uint8 [tiles, 3 * side * side] in reading order."""
    rows, columns = planes.shape[1] // side, planes.shape[2] // side
    tiles = planes.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(tiles).reshape(rows * columns, 3 * side * side)
