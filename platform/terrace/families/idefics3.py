"""Idefics3: the picture enlarged or shrunk to whole tiles, its tiles row by row and the whole behind them, text marks around each.

A stage's `pixels.max` bounds the canvas: its longer side has `sqrt(max) / side` tiles, one to six. Resizing is Pillow's Lanczos filter,
three times in turn, as published. Coordinates are written in thousandths. SmolVLM is the same with other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from terrace.families.checks import complete, language_rules
from terrace.families.interface import Bounds, Family, Finding, Picture, Piece, View
from terrace.families.qwen2_vl import qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape
from terrace.families.siglip_tower import siglip_tower
from terrace.families.tiles import EqualTiles, cut_tiles

COORDINATE_SCALE = 1000
MOST_ALONG = 6  # tiles along a side that have a mark
PLACES = {f"row_{row}_col_{column}": f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)}
VISUAL_MARKS = {"image": "<image>", "around_image": "<fake_token_around_image>", "global_image": "<global-img>", **PLACES}


def template(start: str) -> str:
    """Jinja for the same tokens as `turn`."""
    return (
        start + "{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'] is string %}: {{ message['content'] }}{% else %}"
        "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}<image>{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )


@dataclass(frozen=True)
class Idefics3(EqualTiles, Family):
    """Facts of an image: (rows, columns) of its tiles, 0 for a picture that is one tile."""

    name: ClassVar[str] = "idefics3"
    marks: ClassVar[Mapping[str, str]] = {
        "start": "<|begin_of_text|>", "end_of_text": "<|end_of_text|>", "end_of_turn": "<end_of_utterance>", **VISUAL_MARKS
    }  # fmt: skip
    inside: ClassVar[Mapping[str, str]] = {"row_end": "\n", "tiles_end": "\n\n"}
    beginning: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    never: ClassVar[tuple[str, ...]] = ("start", *VISUAL_MARKS)
    answer_prefix: ClassVar[str] = " "
    fact_count: ClassVar[int] = 2
    chat_template: ClassVar[str] = template("<|begin_of_text|>")
    processor_class: ClassVar[str] = "Idefics3Processor"
    image_processor: ClassVar[str] = "Idefics3ImageProcessor"

    side: int = 364
    patch: int = 14
    shuffle: int = 2  # patches along a token's side
    line_ends: int = 1  # tokens of two line ends in a row: one or two, the tokenizer's business

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Idefics3:
        vision, plain = config.get("vision_config") or {}, cls()
        return cls(
            vision.get("image_size", plain.side), vision.get("patch_size", plain.patch), config.get("scale_factor", plain.shuffle)
        )

    def fitted(self, count: Any) -> Family:
        return replace(self, line_ends=count(self.inside["tiles_end"]))

    def inside_tokens(self, name: str) -> int:
        return self.line_ends if name == "tiles_end" else 1

    # ------------------------------------------------------------ an image

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return (self.side // self.patch // self.shuffle) ** 2

    def most_along(self, most_pixels: int) -> int:
        """Tiles along the longer side."""
        return max(1, min(MOST_ALONG, math.isqrt(max(0, most_pixels)) // self.side))

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        rows, columns = tiles(width, height, self.side, self.most_along(pixels[1]))[1]
        scale = (COORDINATE_SCALE, COORDINATE_SCALE)
        if rows * columns == 1:
            return View(self.tokens, 1, (0, 0), (self.side, self.side), scale, 3)
        count = rows * columns + 1
        marks = 2 * count + 1 + rows - 1 + self.line_ends  # two in front of each picture, one behind all; rows end in a line end
        return View(count * self.tokens, count, (rows, columns), (rows * self.side, columns * self.side), scale, marks)

    def written(self, view: View) -> Iterator[tuple[str, Any]]:
        rows, columns = view.facts
        for row in range(rows):
            for column in range(columns):
                yield from (("mark", "around_image"), ("mark", f"row_{row + 1}_col_{column + 1}"), ("image", self.tokens))
            yield "inside", "row_end" if row + 1 < rows else "tiles_end"
        yield from (("mark", "around_image"), ("mark", "global_image"), ("image", self.tokens), ("mark", "around_image"))

    def largest_image_tokens(self, most_pixels: int) -> int:
        along = self.most_along(most_pixels)
        return (along**2 + (along > 1)) * self.tokens

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        out = np.empty((view.rows, self.row_values), np.uint8) if out is None else out
        along = max(1, *view.facts)
        first = tiles(picture.width, picture.height, self.side, along)[0]
        canvas = picture.resampled(*first).resampled(*view.size)
        out[: view.rows - 1 or 1] = cut_tiles(canvas.planes(*view.size), self.side)
        if view.rows > 1:
            out[-1] = canvas.resampled(self.side, self.side).planes(self.side, self.side).reshape(-1)
        return out

    def pictures_of(self, rows: np.ndarray, facts: Sequence[int]) -> np.ndarray:
        down, across = (max(1, int(fact)) for fact in facts)
        cut = rows[: down * across].reshape(down, across, 3, self.side, self.side).transpose(0, 3, 1, 4, 2)
        return np.ascontiguousarray(cut).reshape(1, down * self.side, across * self.side, 3)

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return [(self.side // self.patch, self.side // self.patch)] * (int(facts[0]) * int(facts[1]) + 1)

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        side = self.side // self.patch // self.shuffle
        return int(facts[0]) * int(facts[1]) + 1, side, side

    # ------------------------------------------------------------ a conversation

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        pieces = iter(content)
        first = next(pieces, None)
        yield "text", f"{role.capitalize()}:", False
        if first is None or first[0] != "image":
            yield "text", " ", supervised and role == "assistant"
        if first is not None:
            yield first
        yield from pieces
        yield "mark", "end_of_turn", supervised
        yield "text", "\n", False

    def generation(self) -> Iterator[Piece]:
        yield "text", "Assistant:", False

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        language = qwen_language(config, vocabulary, attention_biases=bool(config["text_config"].get("attention_bias", False)))
        shuffled = config.get("scale_factor", cls().shuffle) ** 2
        tower = siglip_tower(config["vision_config"], patches_per_token=shuffled, post_norm=True, tiles=True)
        products = tower.width * shuffled * language.width
        return ModelShape(tower, ProjectorShape(products, products, 0), language)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer)
        if "tie_word_embeddings" not in config:
            yield (), "needs `tie_word_embeddings`: models of this class are published both ways"
        vision, at = config.get("vision_config"), ("vision_config",)
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
            return
        if vision["hidden_size"] % vision["num_attention_heads"]:
            yield (*at, "num_attention_heads"), f"{vision['num_attention_heads']} heads do not divide {vision['hidden_size']}"
        shuffle = config.get("scale_factor", cls().shuffle)
        across = vision["image_size"] // vision["patch_size"]
        if across < shuffle or across % shuffle:
            yield (*at, "image_size"), f"its {across} x {across} patches cannot be merged by scale_factor {shuffle}"

    def check_pixels(self, low: int, high: int) -> Iterator[Finding]:
        if high < self.side * self.side:
            yield ("max",), f"{high} pixels hold no tile: one has {self.side} x {self.side} = {self.side * self.side} pixels"
        yield from super().check_pixels(low, high)

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "image_processor_type": self.image_processor,
            "processor_class": self.processor_class,
            "do_image_splitting": True,
            "do_pad": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 1,
            "rescale_factor": 1 / 255,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "size": {"longest_edge": self.most_along(pixels[1]) * self.side},
            "max_image_size": {"longest_edge": self.side},
        }

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return self.side**2, int(values["size"]["longest_edge"]) ** 2

    def processor(self) -> dict[str, Any]:
        return {"processor_class": self.processor_class, "image_seq_len": self.tokens}


@lru_cache(maxsize=65536)
def tiles(width: int, height: int, side: int, along: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the picture with a longer side of `along` tiles, and (rows, columns) of tiles that it is then resized to."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    aspect, longest = width / height, along * side
    if width >= height:
        high, wide = _even(int(longest / aspect)), longest
    else:
        high, wide = longest, _even(int(longest * aspect))
    high, wide = max(1, high), max(1, wide)
    aspect = wide / high
    if wide >= high:
        columns = math.ceil(wide / side)
        return (high, wide), (max(1, math.ceil(int(columns * side / aspect) / side)), columns)
    rows = math.ceil(high / side)
    return (high, wide), (rows, max(1, math.ceil(int(rows * side * aspect) / side)))


def _even(value: int) -> int:
    return value + value % 2


FAMILY = Idefics3
