"""Fuyu and OtterHD: no tower. A patch of raw pixels times one matrix is a token, a mark ends each row, the language model is Persimmon.

A stage's `pixels.max` gives a canvas of 9 x 16: larger pictures shrink into it, none grows. Right and below, the last patches are filled
up. The picture stands before `<s>`, as published; an answer begins behind `<0x04>`. Coordinates are written in thousandths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from terrace.families.checks import complete, head_size
from terrace.families.interface import Bounds, Family, Finding, Picture, Piece, View
from terrace.families.qwen2_vl import cut_patches, joined_patches, qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape, VisionShape

COORDINATE_SCALE = 1000
CANVAS = (9, 16)  # height and width of the canvas, as they relate
FILLED = 1  # the grey level around a picture, as published
TEXT_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Fuyu(Family):
    """Facts of an image: (rows, columns) of its patches."""

    name: ClassVar[str] = "fuyu"
    parts: ClassVar[tuple[str, ...]] = ("projector", "language")
    marks: ClassVar[Mapping[str, str]] = {
        "start": "<s>", "end_of_turn": "|ENDOFTEXT|", "answer": "<0x04>", "image": "|SPEAKER|", "row_end": "|NEWLINE|"
    }  # fmt: skip
    after: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    end_of_text: ClassVar[str] = "end_of_turn"
    never: ClassVar[tuple[str, ...]] = ("start", "answer", "image", "row_end")
    fact_count: ClassVar[int] = 2
    chat_template: ClassVar[str] = (
        "{% set first = messages[0]['content'] %}{% if first is string or first[0]['type'] != 'image' %}<s>{% endif %}"
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for item in message['content'] %}{% if item['type'] == 'image' %}|SPEAKER|<s>{% elif item['type'] == 'text' %}"
        "{{ item['text'] }}{% endif %}{% endfor %}{% endif %}{% if message['role'] == 'user' %}<0x04>"
        "{% elif message['role'] == 'assistant' %}|ENDOFTEXT|{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    )

    patch: int = 30

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Fuyu:
        return cls(config.get("patch_size", 30))

    # ------------------------------------------------------------ an image

    @property
    def row_values(self) -> int:
        return 3 * self.patch * self.patch

    @property
    def unit(self) -> int:
        return self.patch * self.patch

    @property
    def shown_grid(self) -> int:
        return self.patch

    @property
    def fewest_pixels(self) -> int:
        return CANVAS[0] * CANVAS[1] * self.unit

    def canvas(self, most_pixels: int) -> tuple[int, int]:
        """(height, width) of the largest canvas of whole patches that has at most so many pixels, and at least the smallest."""
        along = max(1, math.isqrt(max(0, most_pixels) // (CANVAS[0] * CANVAS[1])) // self.patch) * self.patch
        return CANVAS[0] * along, CANVAS[1] * along

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        if width < 1 or height < 1:
            raise ValueError(f"an image of {width}x{height} pixels is empty")
        high, wide = self.canvas(pixels[1])
        if width > wide or height > high:
            scale = min(high / height, wide / width)
            height, width = max(1, int(height * scale)), max(1, int(width * scale))
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        return View(rows * columns, rows * columns, (rows, columns), (height, width), (COORDINATE_SCALE, COORDINATE_SCALE), rows)

    def written(self, view: View) -> Iterator[tuple[str, Any]]:
        for _ in range(view.facts[0]):
            yield from (("image", view.facts[1]), ("mark", "row_end"))

    def largest_image_tokens(self, most_pixels: int) -> int:
        high, wide = self.canvas(most_pixels)
        return high * wide // self.unit

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        planes = np.full((3, view.facts[0] * self.patch, view.facts[1] * self.patch), FILLED, np.uint8)
        planes[:, : view.size[0], : view.size[1]] = picture.planes(*view.size, bilinear=True)
        return cut_patches(planes, self.patch, 1, out)

    def pictures_of(self, rows: np.ndarray, facts: Sequence[int]) -> np.ndarray:
        high, wide = (int(fact) * self.patch for fact in facts)
        return joined_patches(rows, high, wide, self.patch, 1)[None]

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        """Patches for the projector: there is no tower, and no attention among them."""
        return [(int(facts[0]), int(facts[1]))]

    # ------------------------------------------------------------ a conversation

    def opening(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
        content = messages[0]["content"]
        if not content or content[0].get("type") != "image":
            yield "mark", "start", False

    def running(self, content: Iterable[Piece]) -> Iterator[Piece]:
        pieces = iter(content)
        first = next(pieces, None)
        if first is None or first[0] != "image":
            yield "mark", "start", False
        if first is not None:
            yield first
        yield from pieces

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"Fuyu's form has no turn of role {role!r}")
        yield from content
        if role == "system":
            yield "text", "\n", False
        else:
            yield "mark", "answer" if role == "user" else "end_of_turn", supervised

    def generation(self) -> Iterator[Piece]:
        """Nothing: an answer begins behind the end of the question."""
        return iter(())

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        text = config.get("text_config") or config
        values, language = cls.of(config).row_values, qwen_language({**config, "text_config": text}, vocabulary, attention_biases=True)
        width, normed = language.width, bool(text.get("qk_layernorm", True))
        biases = 4 * width + language.intermediate + (2 * language.head_size if normed else 0)  # behind attention, feed-forward, norms
        language = replace(language, key_heads=language.heads, head_norms=normed, gated=False, layer_biases=biases, other_biases=width)
        return ModelShape(
            VisionShape(
                depth=0, width=0, intermediate=0, heads=1, gated=False, window=None, full_blocks=0, patch_values=0, patches_per_token=1,
                block_parameters=0, other_parameters=0,
            ),
            ProjectorShape(values * width + width, values * width, values // 3, first=True),
            language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        text, at = config.get("text_config"), ("text_config",)
        if not isinstance(text, dict):
            yield (), "needs `text_config`, a map of shape fields"
            return
        wanted = TEXT_FIELDS if trained_tokenizer else (*TEXT_FIELDS, "vocab_size")
        if not (yield from complete(text, wanted, at)):
            return
        if text["hidden_size"] % text["num_attention_heads"]:
            yield (*at, "num_attention_heads"), f"{text['num_attention_heads']} heads do not divide hidden_size {text['hidden_size']}"
        elif head_size(text) % 4:
            yield (*at, "num_attention_heads"), f"heads of {head_size(text)} have no half of even size, which is rotated"
        if text.get("model_type", "persimmon") != "persimmon":
            yield (*at, "model_type"), f"{text['model_type']}: Fuyu's language model is persimmon"
        if text.get("hidden_dropout"):
            yield (*at, "hidden_dropout"), "must be 0: losses are exact under resume"

    def check_pixels(self, low: int, high: int) -> Iterator[Finding]:
        if high < self.fewest_pixels:
            yield ("max",), f"{high} pixels hold no canvas: the smallest, of 9 x 16 patches, has {self.fewest_pixels}"
        yield from super().check_pixels(low, high)

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        high, wide = self.canvas(pixels[1])
        return {
            "image_processor_type": "FuyuImageProcessor",
            "processor_class": "FuyuProcessor",
            "do_resize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": 2,
            "padding_mode": "constant",
            "padding_value": float(FILLED),
            "rescale_factor": 1 / 255,
            "image_mean": 0.5,
            "image_std": 0.5,
            "size": {"height": high, "width": wide},
            "patch_size": {"height": self.patch, "width": self.patch},
        }

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return self.unit, int(values["size"]["height"]) * int(values["size"]["width"])

    def processor(self) -> dict[str, Any]:
        return {"processor_class": "FuyuProcessor"}


FAMILY = Fuyu
