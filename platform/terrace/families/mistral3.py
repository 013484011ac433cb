"""Mistral 3 (Small 3.1 and later): a Pixtral tower at the picture's own size, a mark behind each row of tokens, Mistral's form.

A stage's `pixels.max` gives the longest side, its square root: larger pictures shrink to it, none grows beyond the next whole token.
Coordinates are written in thousandths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.checks import complete, language_rules
from terrace.families.interface import Bounds, Family, Finding, Picture, Piece, View
from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD, cut_patches, joined_patches, qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape, VisionShape

COORDINATE_SCALE = 1000


@dataclass(frozen=True)
class Mistral3(Family):
    """Facts of an image: (rows, columns) of its patches."""

    name: ClassVar[str] = "mistral3"
    marks: ClassVar[Mapping[str, str]] = {
        "start": "<s>", "end_of_turn": "</s>", "start_of_turn": "[INST]", "end_of_question": "[/INST]", "system_start": "[SYSTEM_PROMPT]",
        "system_end": "[/SYSTEM_PROMPT]", "image": "[IMG]", "row_break": "[IMG_BREAK]", "image_end": "[IMG_END]",
    }  # fmt: skip
    beginning: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    end_of_text: ClassVar[str] = "end_of_turn"
    never: ClassVar[tuple[str, ...]] = (
        "start", "start_of_turn", "end_of_question", "system_start", "system_end", "image", "row_break", "image_end"
    )  # fmt: skip
    fact_count: ClassVar[int] = 2
    token_fields: ClassVar[Mapping[str, str]] = {"image_token_index": "image"}
    chat_template: ClassVar[str] = (
        "<s>{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% elif message['role'] == 'system' %}[SYSTEM_PROMPT]"
        "{% endif %}{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}[IMG]{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% if message['role'] == 'user' %}[/INST]{% elif message['role'] == 'system' %}[/SYSTEM_PROMPT]{% else %}</s>{% endif %}"
        "{% endfor %}"
    )

    patch: int = 14
    merge: int = 2

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Mistral3:
        return cls((config.get("vision_config") or {}).get("patch_size", 14), config.get("spatial_merge_size", 2))

    # ------------------------------------------------------------ an image

    @property
    def factor(self) -> int:
        """Pixels along a token's side."""
        return self.patch * self.merge

    @property
    def row_values(self) -> int:
        return 3 * self.patch * self.patch

    @property
    def unit(self) -> int:
        return self.factor * self.factor

    @property
    def shown_grid(self) -> int:
        return self.factor

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        if width < 1 or height < 1:
            raise ValueError(f"an image of {width}x{height} pixels is empty")
        ratio = max(height, width) / max(1, math.isqrt(pixels[1]))
        if ratio > 1:
            height, width = max(1, math.floor(height / ratio)), max(1, math.floor(width / ratio))
        rows, columns = (height - 1) // self.factor + 1, (width - 1) // self.factor + 1
        facts, scale = (rows * self.merge, columns * self.merge), (COORDINATE_SCALE, COORDINATE_SCALE)
        return View(rows * columns, facts[0] * facts[1], facts, (rows * self.factor, columns * self.factor), scale, rows)

    def written(self, view: View) -> Iterator[tuple[str, Any]]:
        rows, columns = (side // self.merge for side in view.facts)
        for row in range(rows):
            yield from (("image", columns), ("mark", "row_break" if row + 1 < rows else "image_end"))

    def largest_image_tokens(self, most_pixels: int) -> int:
        return ((max(1, math.isqrt(max(0, most_pixels))) - 1) // self.factor + 1) ** 2

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        return cut_patches(picture.planes(*view.size), self.patch, 1, out)

    def pictures_of(self, rows: np.ndarray, facts: Sequence[int]) -> np.ndarray:
        high, wide = (int(fact) * self.patch for fact in facts)
        return joined_patches(rows, high, wide, self.patch, 1)[None]

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return [(int(facts[0]), int(facts[1]))]

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        return 1, int(facts[0]) // self.merge, int(facts[1]) // self.merge

    # ------------------------------------------------------------ a conversation

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        before, after = {
            "user": ("start_of_turn", "end_of_question"), "system": ("system_start", "system_end"), "assistant": (None, "end_of_turn")
        }.get(role, (None, None))  # fmt: skip
        if after is None:
            raise ValueError(f"Mistral's form has no turn of role {role!r}")
        if before is not None:
            yield "mark", before, False
        yield from content
        yield "mark", after, supervised

    def generation(self) -> Iterator[Piece]:
        """Nothing: an answer begins behind the end of the question."""
        return iter(())

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, language, family = config["vision_config"], qwen_language(config, vocabulary, attention_biases=False), cls.of(config)
        width, inner, depth, out = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"], language.width
        products = family.merge**2 * width * width + width * out + out * out
        return ModelShape(
            VisionShape(
                depth=depth, width=width, intermediate=inner, heads=vision["num_attention_heads"], gated=True, window=None,
                full_blocks=depth, patch_values=family.row_values, patches_per_token=family.merge**2,
                block_parameters=4 * width * width + 3 * width * inner + 2 * width, other_parameters=family.row_values * width + width,
                outer_norms=1, padded=True,
            ),
            ProjectorShape(width + products + (2 * out if config.get("multimodal_projector_bias", False) else 0), products, out),
            language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer)
        text = config.get("text_config")
        if "tie_word_embeddings" not in config:
            yield (), "needs `tie_word_embeddings`: transformers' class ties where nothing is said, published models do not"
        if isinstance(text, dict) and text.get("sliding_window", 4096) is not None:
            yield ("text_config", "sliding_window"), "must be null: transformers' Mistral slides over 4096 tokens where nothing is said"
        vision, at = config.get("vision_config"), ("vision_config",)
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
        if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
            return
        if vision["hidden_size"] % (vision["num_attention_heads"] * 4):
            told = f"{vision['hidden_size']} / {vision['num_attention_heads']} heads is no multiple of 4, which 2-D rotary positions need"
            yield (*at, "num_attention_heads"), told
        if config.get("vision_feature_layer", -1) != -1:
            yield ("vision_feature_layer",), "must be -1, the tower's last layer"

    def check_pixels(self, low: int, high: int) -> Iterator[Finding]:
        if high < self.unit:
            yield ("max",), f"{high} pixels hold no image: one token has {self.factor} x {self.factor} = {self.unit} pixels"
        yield from super().check_pixels(low, high)

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "image_processor_type": "PixtralImageProcessor",
            "processor_class": "PixtralProcessor",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "do_pad": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
            "size": {"longest_edge": math.isqrt(pixels[1])},
            "patch_size": {"height": self.factor, "width": self.factor},  # of a token, as the whole processor asks for
        }

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return self.unit, int(values["size"]["longest_edge"]) ** 2

    def processor(self) -> dict[str, Any]:
        marks = {name: self.marks[role] for name, role in (("image", "image"), ("image_break", "row_break"), ("image_end", "image_end"))}
        return {
            "processor_class": "PixtralProcessor", "patch_size": self.patch, "spatial_merge_size": self.merge,
            **{f"{name}_token": mark for name, mark in marks.items()},
        }  # fmt: skip


FAMILY = Mistral3
