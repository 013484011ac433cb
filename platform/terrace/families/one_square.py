"""Families whose every picture becomes one square of a fixed side, for which no token stands: two towers, encoders of pictures alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.interface import Bounds, Costs, Family, Picture, View
from terrace.families.tiles import cut_tiles


@dataclass(frozen=True)
class Squares(Family):
    """The fact of a picture is the number of its squares, 1."""

    token_fields: ClassVar[Mapping[str, str]] = {}
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    side: int = 224
    patch: int = 16

    def written(self, view: View) -> Iterator[tuple[str, Any]]:
        """No token stands for a picture."""
        return iter(())

    @property
    def row_values(self) -> int:
        return 3 * self.side * self.side

    @property
    def unit(self) -> int:
        return self.patch * self.patch

    @property
    def patches(self) -> int:
        """Patches of one picture."""
        return (self.side // self.patch) ** 2

    def unfit(self, side: int) -> str | None:
        """Why the tower cannot see squares of this side, or None."""
        if side % self.patch:
            return f"side {side} is no multiple of the tower's patch_size {self.patch}"
        if side > self.side:
            return f"side {side} is more than the tower's image_size {self.side}"
        return None

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        return View(0, 1, (1,), (self.side, self.side), (self.side, self.side))

    def costs(self, widths: np.ndarray, heights: np.ndarray, pixels: Bounds) -> Costs:
        return Costs(*(np.full(len(widths), value, np.int64) for value in (0, 1, self.side, self.side)))

    def largest_image_tokens(self, most_pixels: int) -> int:
        return 0

    @abstractmethod
    def square(self, picture: Picture) -> np.ndarray:
        """uint8 [3, side, side] of a picture, as the published processor cuts it."""

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        rows = cut_tiles(self.square(picture), self.side)
        if out is None:
            return rows
        out[...] = rows
        return out

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return [(self.side // self.patch, self.side // self.patch)]

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
            "image_mean": list(self.mean), "image_std": list(self.std),
        }  # fmt: skip

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return self.side**2, self.side**2
