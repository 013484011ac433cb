"""A family of one's own, as an extension would add it: a class, and what Terrace must know of it, in one importable module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from terrace.families.interface import Bounds, Family, Picture, Piece, View
from terrace.families.llava import Llava
from terrace.families.tiles import cut_tiles
from terrace.models.families.llava import LlavaModel


class ToyConfig(LlavaConfig):
    model_type = "toy_vl"


class ToyForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = ToyConfig


AutoConfig.register("toy_vl", ToyConfig)
AutoModelForImageTextToText.register(ToyConfig, ToyForConditionalGeneration)


@dataclass(frozen=True)
class Toy(Family):
    name: ClassVar[str] = "toy_vl"
    marks: ClassVar[Mapping[str, str]] = {"end_of_turn": "<end>", "end_of_text": "<stop>", "image": "<picture>"}
    never: ClassVar[tuple[str, ...]] = ("image",)
    token_fields: ClassVar[Mapping[str, str]] = {"image_token_index": "image"}
    row_values: ClassVar[int] = 3 * 28 * 28
    unit: ClassVar[int] = 14 * 14
    shape = Llava.shape

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        return View(4, 1, (1,), (28, 28), (28, 28))

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        return cut_tiles(picture.planes(28, 28), 28)

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return [(2, 2)]

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        yield from [("text", f"{role}: ", False), ("cut", None, False)]
        yield from content
        yield "mark", "end_of_turn", supervised

    def generation(self) -> Iterator[Piece]:
        yield "text", "assistant: ", False

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {"size": {"height": 28, "width": 28}, "image_processor_type": "CLIPImageProcessor"}

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return 784, 784


FAMILY, MODEL = Toy, LlavaModel
