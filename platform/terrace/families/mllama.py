"""Mllama (Llama 3.2 Vision): a picture as tiles of one canvas, read by cross-attention layers between those of the language model.

One placeholder stands for a picture. It is resized onto the canvas of at most `max_num_tiles` tiles that enlarges it least (or else shrinks
it least), black on the right and below. The tower always sees all tiles, those that a picture lacks as blank ones;
which canvas it is, embeddings of the tower say, whose numbering the configuration fixes: `pixels` of a stage change nothing.
A token sees the pictures in a row in front of it; see `models.families.mllama`. The part `projector` is the matrix behind the tower and the
cross-attention layers.
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
from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD, qwen_language
from terrace.families.shapes import LanguageShape, ModelShape, ProjectorShape, VisionShape
from terrace.families.tiles import EqualTiles, cut_tiles

COORDINATE_SCALE = 1000
SPARE_ROWS = 8  # of the embedding, behind the vocabulary: the placeholder of the published model stands there
TOWER_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_global_layers", "attention_heads", "image_size", "patch_size")


@dataclass(frozen=True)
class Mllama(EqualTiles, Family):
    """Facts of an image: (rows, columns) of its canvas in tiles."""

    name: ClassVar[str] = "mllama"
    crosses: ClassVar[bool] = True
    unshared: ClassVar[str] = "its pictures are read by cross-attention, which is not split here"
    spare_rows: ClassVar[int] = SPARE_ROWS
    marks: ClassVar[Mapping[str, str]] = {
        "start": "<|begin_of_text|>", "end_of_text": "<|end_of_text|>", "end_of_turn": "<|eot_id|>", "header_start": "<|start_header_id|>",
        "header_end": "<|end_header_id|>", "padding": "<|finetune_right_pad_id|>", "image": "<|image|>",
    }  # fmt: skip
    beginning: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    never: ClassVar[tuple[str, ...]] = ("start", "header_start", "header_end", "padding", "image")
    token_fields: ClassVar[Mapping[str, str]] = {"image_token_index": "image"}
    text_fields: ClassVar[Mapping[str, str]] = {"pad_token_id": "padding"}
    fact_count: ClassVar[int] = 2
    refused_objectives: ClassVar[Mapping[str, str]] = {"mtp": "a further block would need pictures of its own; use medusa"}
    chat_template: ClassVar[str] = (
        "<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}<|image|>{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )

    side: int = 560
    patch: int = 14
    most_tiles: int = 4
    depth: int = 32  # layers of the tower in front of its global ones
    crossing: tuple[int, ...] = ()  # numbers of the language model's layers that read pictures

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Mllama:
        vision, text, plain = config.get("vision_config") or {}, config.get("text_config") or {}, cls()
        return cls(
            vision.get("image_size", plain.side), vision.get("patch_size", plain.patch), vision.get("max_num_tiles", plain.most_tiles),
            vision.get("num_hidden_layers", plain.depth), tuple(text.get("cross_attention_layers") or ()),
        )  # fmt: skip

    # ------------------------------------------------------------ an image

    @property
    def tokens(self) -> int:
        """One placeholder."""
        return 1

    @property
    def vectors(self) -> int:
        """That the tower gives for a tile: patches and the class token."""
        return (self.side // self.patch) ** 2 + 1

    def number(self, rows: int, columns: int) -> int:
        """Of a canvas, as the tower's embeddings count them; 0 is none."""
        return canvases(self.most_tiles).index((rows, columns)) + 1

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        rows, columns = canvas(width, height, self.side, self.most_tiles)
        scale = (COORDINATE_SCALE, COORDINATE_SCALE)
        return View(1, rows * columns, (rows, columns), (rows * self.side, columns * self.side), scale)

    def largest_image_tokens(self, most_pixels: int) -> int:
        return 1

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        high, wide = fitting(picture.width, picture.height, view.size, self.side)
        planes = np.zeros((3, *view.size), np.uint8)
        planes[:, :high, :wide] = picture.planes(high, wide, bilinear=True)
        rows = cut_tiles(planes, self.side)
        if out is None:
            return rows
        out[...] = rows
        return out

    def pictures_of(self, rows: np.ndarray, facts: Sequence[int]) -> np.ndarray:
        down, across = (int(fact) for fact in facts)
        cut = rows.reshape(down, across, 3, self.side, self.side).transpose(0, 3, 1, 4, 2)
        return np.ascontiguousarray(cut).reshape(1, down * self.side, across * self.side, 3)

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        """All tiles of a canvas see each other, and those that it lacks."""
        across = self.side // self.patch
        return [(self.most_tiles * across, across)]

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        return 1, 1, 1

    # ------------------------------------------------------------ a conversation

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        yield from self._header(role)
        if role == "assistant":
            yield "cut", None, False
        yield from content
        yield "mark", "end_of_turn", supervised

    def generation(self) -> Iterator[Piece]:
        yield from self._header("assistant")

    def _header(self, role: str) -> Iterator[Piece]:
        yield from (("mark", "header_start", False), ("text", role, False), ("mark", "header_end", False), ("text", "\n\n", False))

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        family, language = cls.of(config), qwen_language(config, vocabulary, attention_biases=False)
        tower = _tower(config["vision_config"], family)
        own = replace(
            language, layers=language.layers - len(family.crossing), tied=False, other_biases=SPARE_ROWS * language.width
        )
        given = config["vision_config"].get("vision_output_dim", 7680)
        return ModelShape(tower, _crossing(language, given, family), own)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer)
        text, layers = config.get("text_config"), None
        if isinstance(text, dict):
            layers, count = text.get("cross_attention_layers"), text.get("num_hidden_layers", 0)
            at = ("text_config", "cross_attention_layers")
            if not isinstance(layers, list | tuple):
                yield at[:1], "needs `cross_attention_layers`, the numbers of the layers that read pictures: the default is another model's"
            elif len(set(layers)) != len(layers) or not all(isinstance(n, int) and 0 <= n < count for n in layers) or len(layers) >= count:
                yield at, f"{list(layers)} must be different numbers from 0 to {count - 1}, and not all of them"
            if text.get("dropout"):
                yield ("text_config", "dropout"), "must be 0: packed attention has no dropout"
        if config.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings")):
            yield ("tie_word_embeddings",), f"must be false: the embedding has {SPARE_ROWS} rows more than the output layer"
        vision, at = config.get("vision_config"), ("vision_config",)
        if isinstance(vision, dict) and (yield from complete(vision, TOWER_FIELDS, at)):
            yield from _tower_rules(vision, at)

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "image_processor_type": "MllamaImageProcessor", "processor_class": "MllamaProcessor", "do_resize": True, "do_pad": True,
            "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 2, "rescale_factor": 1 / 255,
            "image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD), "size": {"height": self.side, "width": self.side},
            "max_image_tiles": self.most_tiles,
        }  # fmt: skip

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        tile = int(values["size"]["height"]) * int(values["size"]["width"])
        return tile, tile * int(values["max_image_tiles"])

    def processor(self) -> dict[str, Any]:
        return {"processor_class": "MllamaProcessor"}


# ---------------------------------------------------------------- canvases


@lru_cache(maxsize=64)
def canvases(most: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of every canvas of at most so many tiles, in the order in which the tower numbers them."""
    return tuple((rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1))


@lru_cache(maxsize=65536)
def canvas(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """(rows, columns) of the canvas that enlarges a picture least, or else shrinks it least; of equals that of the fewest tiles."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    scales = {(rows, columns): min(rows * side / height, columns * side / width) for rows, columns in canvases(most)}
    larger = [scale for scale in scales.values() if scale >= 1]
    chosen = min(larger) if larger else max(scales.values())
    return min((one for one, scale in scales.items() if scale == chosen), key=lambda one: one[0] * one[1])


def fitting(width: int, height: int, size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) of a picture on a canvas of (height, width) `size`: never enlarged beyond its own size but to one tile."""
    wide, high = (min(max(own, side), most) for own, most in ((width, size[1]), (height, size[0])))
    across, down = wide / width, high / height
    if across < down:
        return min(math.floor(height * across) or 1, high), wide
    return high, min(math.floor(width * down) or 1, wide)


# ---------------------------------------------------------------- what the planner counts


def _tower(vision: Mapping[str, Any], family: Mllama) -> VisionShape:
    """Layers over all tiles of a picture, a few of them gated; positions and canvases are learned, once for each tile."""
    width, inner, depth, gated = (vision[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_global_layers"))
    values, tiles, vectors = 3 * family.patch**2, family.most_tiles, family.vectors
    numbers = len(canvases(tiles)) + 1
    block = 4 * width * width + 2 * width * inner + inner + width + 4 * width
    other = values * width + width + 4 * width  # patches, the class token, two norms
    other += 2 * (numbers * tiles * width + 1) + vectors * width + numbers * tiles * vectors * width + 1
    padded = tiles * (vectors + -vectors % 8)
    return VisionShape(
        depth=depth + gated, width=width, intermediate=inner, heads=vision["attention_heads"], gated=False, window=None,
        full_blocks=depth + gated, patch_values=values, patches_per_token=tiles * (vectors - 1), block_parameters=block + 2,
        smaller=2 * depth, other_parameters=other, extra_tokens=padded - tiles * (vectors - 1), kept_inner=2,
        mask_keys=padded**2 / (tiles * (vectors - 1)), outer_norms=2,
    )  # fmt: skip


def _crossing(language: LanguageShape, given: int, family: Mllama) -> ProjectorShape:
    """The matrix behind the tower, and layers that read what it gives: counted as if every picture had all of its tiles."""
    width, inner, key, layers = language.width, language.intermediate, language.key_width, len(family.crossing)
    seen = family.most_tiles * family.vectors
    layer = 2 * width * language.query_width + 2 * width * key + 2 * language.head_size + 3 * width * inner + 2 * width + 2
    outer = seen * given * width
    return ProjectorShape(
        parameters=given * width + width + layers * layer, products=outer + layers * 2 * seen * width * key, outer=outer,
        inner=seen * (given + layers * 2 * language.query_width) // 3,
        text_products=layers * (2 * width * language.query_width + 2 * seen * language.query_width + 3 * width * inner),
        text_kept=layers * (10 * width + 5 * inner), enters=min(family.crossing, default=0),
    )  # fmt: skip


def _tower_rules(vision: Mapping[str, Any], at: tuple[str, ...]) -> Iterator[Finding]:
    side, patch, most = vision["image_size"], vision["patch_size"], vision.get("max_num_tiles", 4)
    if side % patch:
        yield (*at, "image_size"), f"{side} pixels are no whole number of patches of {patch}"
    if vision["hidden_size"] % vision["attention_heads"]:
        yield (*at, "attention_heads"), f"{vision['attention_heads']} heads do not divide hidden_size {vision['hidden_size']}"
    if [list(one) for one in vision.get("supported_aspect_ratios") or canvases(4)] != [list(one) for one in canvases(most)]:
        yield (*at, "supported_aspect_ratios"), f"must be all canvases of at most {most} tiles: {[list(one) for one in canvases(most)]}"
    taken, depth = vision.get("intermediate_layers_indices") or [3, 7, 15, 23, 30], vision["num_hidden_layers"]
    if not all(isinstance(number, int) and 0 <= number < depth for number in taken):
        yield (*at, "intermediate_layers_indices"), f"{list(taken)} must be numbers from 0 to {depth - 1}"
    width = (1 + len(taken)) * vision["hidden_size"]
    if vision.get("vision_output_dim", 7680) != width:
        yield (*at, "vision_output_dim"), f"must be {width}: the width of the tower times what is taken of it ({1 + len(taken)} layers)"


FAMILY = Mllama
