"""SigLIP 2 (NaFlex): a picture in its own aspect ratio, as many patches as `pixels.max` of the stage allows, positions resized to it.

The published fixed-size checkpoints of SigLIP 2 are of the class `SiglipModel`: they are the family `siglip`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from terrace.families.interface import Bounds, Costs, Family, Finding, Picture, View
from terrace.families.siglip import Siglip

PRECISION = 1e-5  # of the scale, as the published processor searches it


@dataclass(frozen=True)
class Siglip2(Siglip):
    """The facts of an image are the (rows, columns) of its patches; a row of pixels is a patch."""

    name: ClassVar[str] = "siglip2"
    marks: ClassVar[Mapping[str, str]] = {"end_of_text": "<eos>", "padding": "<pad>"}
    text_fields: ClassVar[Mapping[str, str]] = {"pad_token_id": "padding"}
    fact_count: ClassVar[int] = 2
    image_processor: ClassVar[str] = "Siglip2ImageProcessor"
    processor_class: ClassVar[str] = "Siglip2Processor"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Siglip2:
        vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
        patch = int(vision.get("patch_size") or cls.patch)
        side = math.isqrt(int(vision.get("num_patches") or 256)) * patch
        return cls(side, patch, int(text.get("max_position_embeddings") or cls.context))

    @property
    def row_values(self) -> int:
        return 3 * self.patch * self.patch

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        if min(width, height) < 1:
            raise ValueError(f"an image of {width}x{height} has no pixels")
        rows, columns = patch_grid(width, height, self.patch, self.most_patches(pixels))
        size = (rows * self.patch, columns * self.patch)
        return View(0, rows * columns, (rows, columns), size, size)

    def costs(self, widths: np.ndarray, heights: np.ndarray, pixels: Bounds) -> Costs:
        return Family.costs(self, widths, heights, pixels)

    def most_patches(self, pixels: Bounds) -> int:
        """Patches of any picture, at most."""
        return max(1, pixels[1] // self.patch**2)

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        patch, (rows, columns) = self.patch, view.facts
        planes = picture.planes(*view.size).reshape(3, rows, patch, columns, patch)
        cut = np.ascontiguousarray(planes.transpose(1, 3, 0, 2, 4)).reshape(rows * columns, 3 * patch * patch)
        if out is None:
            return cut
        out[...] = cut
        return out

    def pictures_of(self, rows: np.ndarray, facts: Sequence[int]) -> np.ndarray:
        patch, (high, wide) = self.patch, facts
        picture = rows.reshape(high, wide, 3, patch, patch).transpose(0, 3, 1, 4, 2)
        return np.ascontiguousarray(picture).reshape(1, high * patch, wide * patch, 3)

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return [(int(facts[0]), int(facts[1]))]

    @classmethod
    def patches_of(cls, vision: Mapping[str, Any]) -> int:
        return int(vision.get("num_patches", 256))

    @classmethod
    def picture_fields(cls) -> tuple[str, ...]:
        return ("num_patches", "patch_size")

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from super().check(config, trained_tokenizer)
        patches = (config.get("vision_config") or {}).get("num_patches")
        if isinstance(patches, int) and patches > 0 and math.isqrt(patches) ** 2 != patches:
            yield ("vision_config", "num_patches"), f"{patches} is no square number: positions are a square that is resized"

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        values = super().preprocessor(pixels) | {"patch_size": self.patch, "max_num_patches": self.most_patches(pixels)}
        del values["size"]
        return values

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return 1, int(values["max_num_patches"]) * self.patch**2


@lru_cache(maxsize=4096)
def patch_grid(width: int, height: int, patch: int, most: int) -> tuple[int, int]:
    """(rows, columns) in patches of the largest size in this aspect ratio, each edge rounded up, that has at most `most`."""

    def sides(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(scale * size / patch)) for size in (height, width))
        return rows, columns

    low, high = PRECISION / 10, 100.0
    while high - low >= PRECISION:
        middle = (low + high) / 2
        rows, columns = sides(middle)
        low, high = (middle, high) if rows * columns <= most else (low, middle)
    return sides(low)


FAMILY = Siglip2
