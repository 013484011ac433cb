"""What families share whose image becomes one square tile of the tower's size, with a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.interface import Bounds, Costs, Family, Picture, View
from terrace.families.tiles import cut_tiles

COORDINATE_SCALE = 1000


@dataclass(frozen=True)
class OneTile(Family):
    """The picture is stretched to the tile. `pixels` of a stage change nothing. The fact of an image is its number of tiles, 1;
    coordinates are thousandths."""

    bilinear: ClassVar[bool] = False  # how the published processor resizes; else bicubic
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    image_processor: ClassVar[str] = "SiglipImageProcessor"
    processor_class: ClassVar[str] = ""

    side: int = 224
    patch: int = 14

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Of one image."""
        return self.patches

    @property
    def row_values(self) -> int:
        return 3 * self.side * self.side

    @property
    def unit(self) -> int:
        return max(1, self.side * self.side // self.tokens)

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        if width < 1 or height < 1:
            raise ValueError(f"an image of {width}x{height} pixels is empty")
        return View(self.tokens, 1, (1,), (self.side, self.side), (COORDINATE_SCALE, COORDINATE_SCALE))

    def costs(self, widths: np.ndarray, heights: np.ndarray, pixels: Bounds) -> Costs:
        columns = (self.tokens, 1, COORDINATE_SCALE, COORDINATE_SCALE)
        return Costs(*(np.full(len(widths), value, np.int64) for value in columns))

    def largest_image_tokens(self, most_pixels: int) -> int:
        return self.tokens

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        rows = cut_tiles(picture.planes(self.side, self.side, self.bilinear), self.side)
        if out is None:
            return rows
        out[...] = rows
        return out

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return [(self.side // self.patch, self.side // self.patch)]

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        return 1, 1, self.tokens

    @classmethod
    def resized(cls, config: Mapping[str, Any], side: int) -> dict[str, Any]:
        return {**config, "vision_config": {**config["vision_config"], "image_size": side}}

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "image_processor_type": self.image_processor, "processor_class": self.processor_class, "do_resize": True, "do_rescale": True,
            "do_normalize": True, "do_convert_rgb": True, "resample": 2 if self.bilinear else 3, "rescale_factor": 1 / 255,
            "image_mean": list(self.mean), "image_std": list(self.std), "size": {"height": self.side, "width": self.side},
        }  # fmt: skip

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        pixels = int(values["size"]["height"]) * int(values["size"]["width"])
        return pixels, pixels

    def processor(self) -> dict[str, Any]:
        return {"processor_class": self.processor_class}
