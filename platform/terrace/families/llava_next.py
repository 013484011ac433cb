"""LLaVA-NeXT (1.6): LLaVA on an overview and on tiles of a canvas that fits the picture, with a newline feature behind each row.

The canvases are `image_grid_pinpoints` of the configuration; `pixels` of a stage change nothing. Features that show only padding are
dropped, and the newline is a trained vector, no text: an image's placeholders stand in one run. Coordinates are LLaVA's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from terrace.families.anyres import Canvases, best_canvas, canvases_of, laid_on_canvas, shown_features
from terrace.families.interface import Bounds, Costs, Family, Finding, Picture, View
from terrace.families.llava import SHARES, Llava
from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD
from terrace.families.shapes import ModelShape
from terrace.families.tiles import cut_tiles

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class LlavaNext(Llava):
    """Facts of an image: its own (height, width), from which the model finds canvas and padding again."""

    name: ClassVar[str] = "llava_next"
    fact_count: ClassVar[int] = 2
    whole_pictures: ClassVar[bool] = False  # the overview is shown
    processor_class: ClassVar[str] = "LlavaNextProcessor"
    image_processor: ClassVar[str] = "LlavaNextImageProcessor"

    canvases: Canvases = PINPOINTS

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LlavaNext:
        vision = config.get("vision_config") or {}
        keeps = config.get("vision_feature_select_strategy", "default") == "full"
        canvases = canvases_of(config.get("image_grid_pinpoints"), PINPOINTS)
        return cls(vision.get("image_size", 336), vision.get("patch_size", 14), keeps, canvases)

    # ------------------------------------------------------------ an image

    @property
    def cells(self) -> int:
        """Features along a tile's side."""
        return self.side // self.patch

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of the canvas' tiles."""
        high, wide = best_canvas(width, height, self.canvases)
        return high // self.side, wide // self.side

    def features(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of the canvas' features that are kept, without the newlines."""
        rows, columns = self.grid(width, height)
        return shown_features(width, height, rows * self.cells, columns * self.cells)

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        rows, columns = self.grid(width, height)
        down, across = self.features(width, height)
        size = (rows * self.side, columns * self.side)
        return View(self.tokens + down * (across + 1), 1 + rows * columns, (height, width), size, (SHARES, SHARES))

    def costs(self, widths: np.ndarray, heights: np.ndarray, pixels: Bounds) -> Costs:
        return Family.costs(self, widths, heights, pixels)

    def largest_image_tokens(self, most_pixels: int) -> int:
        return max(self.view(wide, high, (1, 1)).tokens for high, wide in self.canvases)

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        out = np.empty((view.rows, self.row_values), np.uint8) if out is None else out
        out[0] = picture.planes(self.side, self.side).reshape(-1)
        out[1:] = cut_tiles(laid_on_canvas(picture, view.size), self.side)
        return out

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        rows, columns = self.grid(int(facts[1]), int(facts[0]))
        return [(self.cells, self.cells)] * (1 + rows * columns)

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        """Overview, tiles without padding and newlines are no rectangle: all in one row."""
        return 1, 1, self.view(int(facts[1]), int(facts[0]), (1, 1)).tokens

    def shown_coordinate(self, value: float, axis: int, size: tuple[int, int], shown: tuple[int, int]) -> int:
        return Family.shown_coordinate(self, value, axis, size, shown)  # in the overview, which is not padded

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        shape = super().shape(config, vocabulary)
        newline = shape.language.width
        projector = replace(shape.projector, parameters=shape.projector.parameters + newline)
        return replace(shape, projector=projector, vision=replace(shape.vision, tile_patches=cls.of(config).cells ** 2))

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from super().check(config, trained_tokenizer)
        yield from check_canvases(config)
        if config.get("vision_feature_select_strategy", "default") == "full":
            yield ("vision_feature_select_strategy",), "must be `default`: a class token has no place among the tiles' rows and columns"

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "image_processor_type": self.image_processor,
            "processor_class": self.processor_class,
            "do_pad": True,
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
            "size": {"shortest_edge": self.side},
            "crop_size": {"height": self.side, "width": self.side},
            "image_grid_pinpoints": [list(canvas) for canvas in self.canvases],
        }

    def processor(self) -> dict[str, Any]:
        return {**super().processor(), "processor_class": self.processor_class}


def check_canvases(config: Mapping[str, Any]) -> Iterator[Finding]:
    """`image_grid_pinpoints` that are not made of whole tiles."""
    pinpoints, side = config.get("image_grid_pinpoints"), (config.get("vision_config") or {}).get("image_size")
    if pinpoints is None or not isinstance(side, int):
        return
    for place, pinpoint in enumerate(pinpoints):
        if len(pinpoint) != 2 or any(not isinstance(value, int) or value < 1 or value % side for value in pinpoint):
            yield ("image_grid_pinpoints", str(place)), f"{pinpoint} must be a height and a width, multiples of the tile's {side} pixels"


FAMILY = LlavaNext
