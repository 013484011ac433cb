"""A picture as an overview and slices at their own aspect, cut into patches: what follows from sizes in patches alone.

Stands before `Family`, which says `patch`, the side of one in pixels. Facts of an image: (rows, columns) of slices, then (height,
width) of the overview and of a slice in patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from terrace.families.interface import Picture, View
from terrace.families.qwen2_vl import cut_patches, joined_patches


class Slices:
    patch: int
    overview_first: ClassVar[bool] = True  # its patches stand before those of the slices, or behind them

    @property
    def row_values(self) -> int:
        return 3 * self.patch * self.patch

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        out = np.empty((view.rows, self.row_values), np.uint8) if out is None else out
        rows, columns, *sides = view.facts
        overview = sides[0] * sides[1]
        whole, parts = (out[:overview], out[overview:]) if self.overview_first else (out[-overview:], out[:-overview])
        cut_patches(picture.planes(sides[0] * self.patch, sides[1] * self.patch), self.patch, 1, whole)
        if rows:
            high, wide = sides[2] * self.patch, sides[3] * self.patch
            planes = picture.planes(*view.size).reshape(3, rows, high, columns, wide)
            slices = parts.reshape(rows, columns, sides[2] * sides[3], self.row_values)
            for row in range(rows):
                for column in range(columns):
                    cut_patches(planes[:, row, :, column], self.patch, 1, slices[row, column])
        return out

    def pictures_of(self, rows: np.ndarray, facts: Sequence[int]) -> np.ndarray:
        """The overview."""
        high, wide = int(facts[2]), int(facts[3])
        overview = rows[: high * wide] if self.overview_first else rows[-high * wide :]
        return joined_patches(overview, high * self.patch, wide * self.patch, self.patch, 1)[None]

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        rows, columns, *sides = (int(fact) for fact in facts)
        overview, slices = [(sides[0], sides[1])], [(sides[2], sides[3])] * (rows * columns)
        return overview + slices if self.overview_first else slices + overview
