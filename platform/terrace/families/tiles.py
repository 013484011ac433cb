"""A picture as equal square tiles, each of them one row of pixels: what follows from a tile's side and tokens alone."""

from __future__ import annotations


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
