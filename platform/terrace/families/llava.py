"""LLaVA and LLaVA-1.5: a CLIP tower on the image padded to a square, a fixed number of tokens, Vicuna's conversation form.

`pixels` of a stage change nothing: every image becomes one tile of the tower's size. Coordinates are shares of the
padded square with two decimals, as LLaVA-1.5's own region data has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.checks import complete, language_rules
from terrace.families.interface import Bounds, Costs, Family, Finding, Picture, Piece, View
from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD, qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape, VisionShape
from terrace.families.squares import padded_coordinate, padded_coordinates
from terrace.families.tiles import cut_tiles

PADDING = (122, 116, 104)  # CLIP's mean as a colour
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SHARES = 100  # coordinates are written as hundredths


@dataclass(frozen=True)
class Llava(Family):
    """The fact of an image is its number of tiles, 1."""

    name: ClassVar[str] = "llava"
    marks: ClassVar[Mapping[str, str]] = {"start": "<s>", "end_of_turn": "</s>", "image": "<image>"}
    end_of_text: ClassVar[str] = "end_of_turn"
    beginning: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    never: ClassVar[tuple[str, ...]] = ("image", "start")
    answer_prefix: ClassVar[str] = " "
    token_fields: ClassVar[Mapping[str, str]] = {"image_token_index": "image"}
    chat_template: ClassVar[str] = (
        "<s>{% for message in messages %}{% if message['role'] == 'system' %}{% set text = '' %}{% else %}"
        "{% if loop.first %}" + SYSTEM + " {% endif %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}<image>{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )

    side: int = 336
    patch: int = 14
    class_token: bool = False  # `vision_feature_select_strategy: full` keeps it

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Llava:
        vision = config.get("vision_config") or {}
        keeps = config.get("vision_feature_select_strategy", "default") == "full"
        return cls(vision.get("image_size", 336), vision.get("patch_size", 14), keeps)

    # ------------------------------------------------------------ an image

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2 + self.class_token

    @property
    def row_values(self) -> int:
        return 3 * self.side * self.side

    @property
    def unit(self) -> int:
        return self.patch * self.patch

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        return View(self.tokens, 1, (1,), (self.side, self.side), (SHARES, SHARES))

    def costs(self, widths: np.ndarray, heights: np.ndarray, pixels: Bounds) -> Costs:
        return Costs(*(np.full(len(widths), value, np.int64) for value in (self.tokens, 1, SHARES, SHARES)))

    def largest_image_tokens(self, most_pixels: int) -> int:
        return self.tokens

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        rows = cut_tiles(picture.padded_square(PADDING).planes(self.side, self.side), self.side)
        if out is None:
            return rows
        out[...] = rows
        return out

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return [(self.side // self.patch, self.side // self.patch)]

    # ------------------------------------------------------------ coordinates: shares of the padded square

    def coordinate(self, value: float, axis: int, size: tuple[int, int], view: View) -> int:
        return padded_coordinate(value, axis, size, SHARES)

    def coordinates(
        self, values: np.ndarray, axes: np.ndarray, widths: np.ndarray, heights: np.ndarray, costs: Costs
    ) -> np.ndarray:
        return padded_coordinates(values, axes, widths, heights, SHARES)

    def shown_coordinate(self, value: float, axis: int, size: tuple[int, int], shown: tuple[int, int]) -> int:
        return padded_coordinate(value, axis, size, shown[axis])

    def coordinate_text(self, number: int) -> str:
        return f"0.{number:02d}"

    def coordinate_tokens(self, numbers: np.ndarray) -> np.ndarray:
        return np.ones(len(numbers), np.int64)  # every one has as many characters as the shortest

    # ------------------------------------------------------------ Vicuna's form

    def opening(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
        if messages[0]["role"] != "system":
            yield "text", f"{SYSTEM} ", False

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        if role == "assistant":
            yield "text", "ASSISTANT:", False
            yield "text", self.answer_prefix, supervised
            yield from content
            yield "mark", "end_of_turn", supervised
            return
        if role not in ("user", "system"):
            raise ValueError(f"Vicuna's form has no turn of role {role!r}")
        if role == "user":
            yield "text", "USER: ", False
        yield from content
        yield "text", " ", False

    def generation(self) -> Iterator[Piece]:
        yield "text", "ASSISTANT:", False

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, language = config["vision_config"], qwen_language(config, vocabulary, attention_biases=False)
        width, inner, depth = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
        family = cls.of(config)
        block = clip_block(width, inner)
        patches = (family.side // family.patch) ** 2
        values = 3 * family.patch**2
        idle = idle_blocks(config)
        return ModelShape(
            VisionShape(
                depth=depth, width=width, intermediate=inner, heads=vision["num_attention_heads"], gated=False, window=None,
                full_blocks=depth, patch_values=values, patches_per_token=1, block_parameters=block,
                other_parameters=width + values * width + (patches + 1) * width + 4 * width, extra_tokens=1,
                unused_parameters=idle * block + 2 * width, idle_blocks=idle,
            ),
            ProjectorShape(
                width * language.width + language.width * language.width + 2 * language.width,
                language.width * (width + language.width), language.width,
            ),
            language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer)
        vision, at = config.get("vision_config"), ("vision_config",)
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
            return
        if vision["image_size"] % vision["patch_size"]:
            yield (*at, "image_size"), f"{vision['image_size']} is no multiple of patch_size {vision['patch_size']}"
        if vision["hidden_size"] % vision["num_attention_heads"]:
            yield (*at, "num_attention_heads"), f"{vision['num_attention_heads']} heads do not divide {vision['hidden_size']}"
        if not isinstance(config.get("vision_feature_layer", -2), int):
            yield ("vision_feature_layer",), "must be one layer; several layers side by side are not supported"

    @classmethod
    def resized(cls, config: Mapping[str, Any], side: int) -> dict[str, Any]:
        changed = {**config, "vision_config": {**config["vision_config"], "image_size": side}}
        return {**changed, "image_seq_length": cls.of(changed).tokens} if "image_seq_length" in config else changed

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_pad": True,  # the class's own default crops, LLaVA-1.5 pads
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
        }

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return self.side**2, self.side**2

    def processor(self) -> dict[str, Any]:
        return {
            "processor_class": "LlavaProcessor",
            "patch_size": self.patch,
            "vision_feature_select_strategy": "full" if self.class_token else "default",
            "num_additional_image_tokens": 1,
            "image_token": self.marks["image"],
        }


def clip_block(width: int, inner: int) -> int:
    """Parameters of a block of CLIP's or SigLIP's tower: attention and feed-forward with biases, two norms."""
    return 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width


def idle_blocks(config: Mapping[str, Any], default: int = -2) -> int:
    """Blocks of the tower behind the layer whose features are taken: they run, and never train."""
    layer, depth = config.get("vision_feature_layer", default), config["vision_config"]["num_hidden_layers"]
    return depth - layer if layer >= 0 else -layer - 1


FAMILY = Llava
