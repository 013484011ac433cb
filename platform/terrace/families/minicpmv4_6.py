"""MiniCPM-V (transformers' 4.6 class): an overview and slices at their own aspect, marks around each, ChatML.

A stage's `pixels.max` bounds the slices: `max / image_size^2`, at least one. In front of every image stands its number in the sample.
The tower merges 2 x 2 patches inside and 2 x 2 behind it: a token is 4 x 4 patches. Coordinates are written in thousandths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from terrace.errors import InputError
from terrace.families.chatml import MARKS, ChatML, chat_template
from terrace.families.checks import complete, language_rules
from terrace.families.interface import Bounds, Finding, Piece, View
from terrace.families.qwen2_vl import qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape, VisionShape
from terrace.families.slices import Slices
from terrace.families.slicing import sliced

COORDINATE_SCALE = 1000
MERGE = 4  # patches along a token's side: two merges of 2 x 2
MOST_SLICES = 40
LANGUAGES = ("qwen2", "qwen3", "llama")


@dataclass(frozen=True)
class MiniCPMV(Slices, ChatML):
    """Facts of an image: (rows, columns) of slices, then (height, width) of the overview and of a slice in patches."""

    name: ClassVar[str] = "minicpmv4_6"
    marks: ClassVar[Mapping[str, str]] = {
        **MARKS, "image": "<|image_pad|>", "image_start": "<image>", "image_end": "</image>", "slice_start": "<slice>",
        "slice_end": "</slice>", "image_id_start": "<image_id>", "image_id_end": "</image_id>",
    }  # fmt: skip
    inside: ClassVar[Mapping[str, str]] = {"row_end": "\n"}
    never: ClassVar[tuple[str, ...]] = (
        "image", "image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end", "start_of_turn"
    )  # fmt: skip
    token_names: ClassVar[Mapping[str, str]] = {
        f"{name}_token": name
        for name in ("image", "image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
    } | {"video_token": "end_of_text"}  # asked for; stands for nothing, since no videos are read here
    fact_count: ClassVar[int] = 6
    whole_pictures: ClassVar[bool] = False  # the overview is shown
    chat_template: ClassVar[str] = chat_template("<|image_pad|>")

    scale: int = 448  # side of a slice of aspect 1
    patch: int = 14

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> MiniCPMV:
        vision, kind = config.get("vision_config") or {}, (config.get("text_config") or {}).get("model_type")
        if kind is not None and kind not in LANGUAGES:  # also where a checkpoint brings it
            raise InputError(f"model: {cls.name} with a language model of type {_refused(kind)}")
        return cls(config.get("image_size", 448), vision.get("patch_size", 14))

    # ------------------------------------------------------------ an image

    @property
    def unit(self) -> int:
        return (self.patch * MERGE) ** 2

    @property
    def fewest_pixels(self) -> int:
        return self.scale * self.scale

    def most_slices(self, most_pixels: int) -> int:
        return max(1, min(MOST_SLICES, most_pixels // (self.scale * self.scale)))

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        grid, overview, part = sliced(width, height, self.scale, self.patch * MERGE, self.most_slices(pixels[1]))
        slices = grid[0] * grid[1]
        area = overview[0] * overview[1] + slices * part[0] * part[1]
        facts = (*grid, *(side // self.patch for side in (*overview, *part)))
        size = (grid[0] * part[0], grid[1] * part[1]) if slices else overview
        marks = 2 + 2 * slices + max(0, grid[0] - 1)  # around each picture, and a line end between rows
        return View(area // self.unit, area // self.patch**2, facts, size, (COORDINATE_SCALE, COORDINATE_SCALE), marks)

    def heading(self, number: int) -> Iterator[Piece]:
        yield "mark", "image_id_start", False
        yield "text", str(number), False
        yield "mark", "image_id_end", False

    def heading_tokens(self, number: int) -> int:
        return 2 + len(str(number))

    def written(self, view: View) -> Iterator[tuple[str, Any]]:
        rows, columns, *sides = view.facts
        tokens = [high * wide // MERGE**2 for high, wide in (sides[:2], sides[2:])]
        yield from (("mark", "image_start"), ("image", tokens[0]), ("mark", "image_end"))
        for place in range(rows * columns):
            if place and place % columns == 0:
                yield "inside", "row_end"
            yield from (("mark", "slice_start"), ("image", tokens[1]), ("mark", "slice_end"))

    def largest_image_tokens(self, most_pixels: int) -> int:
        slices = self.most_slices(most_pixels)
        return (slices + (slices > 1)) * (self.scale**2 // self.unit)

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        """Overview and slices have different sizes: all in one row."""
        return 1, 1, sum(high * wide for high, wide in self.tower_pictures(facts)) // MERGE**2

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, kind = config["vision_config"], config["text_config"].get("model_type", "qwen2")
        language = qwen_language(config, vocabulary, attention_biases=kind == "qwen2", head_norms=kind == "qwen3")
        width, inner, depth = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
        attention, norm, window = 4 * width * width + 4 * width, 2 * width, 4
        block = attention + 2 * width * inner + inner + width + 2 * norm
        values, places = 3 * vision["patch_size"] ** 2, (vision["image_size"] // vision["patch_size"]) ** 2
        merger = attention + norm + window * norm + window * width * window * inner + window * inner + window * inner * width + width
        merged = window * width
        return ModelShape(
            VisionShape(
                depth=depth, width=width, intermediate=inner, heads=vision["num_attention_heads"], gated=False, window=None,
                full_blocks=depth, patch_values=values, patches_per_token=MERGE**2, block_parameters=block,
                other_parameters=values * width + width + places * width + norm + merger,
                tile_patches=(config.get("image_size", 448) // vision["patch_size"]) ** 2, kept_inner=2,
                merged_blocks=depth - 1 - config.get("insert_layer_id", 6), merged_patches=window,
                merger_products=4 * width * width + window * width * inner + inner * width, merger_keys=window,
            ),
            ProjectorShape(
                2 * merged + merged * merged + merged + merged * language.width + language.width,
                merged * (merged + language.width), merged,
            ),
            language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer)
        kind = (config.get("text_config") or {}).get("model_type", "qwen3_5_text")
        if kind not in LANGUAGES:
            yield ("text_config", "model_type"), _refused(kind)
        vision, at = config.get("vision_config"), ("vision_config",)
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
            return
        if vision["hidden_size"] % vision["num_attention_heads"]:
            yield (*at, "num_attention_heads"), f"{vision['num_attention_heads']} heads do not divide {vision['hidden_size']}"
        if config.get("image_size", 448) % (vision["patch_size"] * MERGE):
            yield ("image_size",), f"{config['image_size']} is no multiple of a token's {vision['patch_size'] * MERGE} pixels"
        inserted = config.get("insert_layer_id", 6)
        if not 0 <= inserted < vision["num_hidden_layers"]:
            yield ("insert_layer_id",), f"there is no block {inserted}: the tower has {vision['num_hidden_layers']}, counted from 0"
        fixed = {"downsample_mode": "16x", "merger_times": 1, "drop_vision_last_layer": False}
        for field, value in fixed.items():
            if config.get(field, value) != value:
                yield (field,), f"{config[field]!r}: this platform's preprocessing is made for {value!r}"
        for part, field in ((config, "merge_kernel_size"), (vision, "window_kernel_size")):
            if list(part.get(field, (2, 2))) != [2, 2]:
                yield (*(at if part is vision else ()), field), f"{part[field]} must be [2, 2]"

    def check_pixels(self, low: int, high: int) -> Iterator[Finding]:
        if high < self.scale * self.scale:
            yield ("max",), f"{high} pixels hold no slice: one has {self.scale} x {self.scale} = {self.scale * self.scale} pixels"
        yield from super().check_pixels(low, high)

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "image_processor_type": "MiniCPMV4_6ImageProcessor",
            "processor_class": "MiniCPMV4_6Processor",
            "max_slice_nums": self.most_slices(pixels[1]),
            "scale_resolution": self.scale,
            "patch_size": self.patch,
            "slice_mode": True,
            "downsample_mode": "16x",
            "use_image_id": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return self.scale**2, self.scale**2 * int(values["max_slice_nums"])

    def processor(self) -> dict[str, Any]:
        return {"processor_class": "MiniCPMV4_6Processor"}


def _refused(kind: str) -> str:
    return f"{kind}, whose attention cannot be packed here; there are {', '.join(LANGUAGES)}"


FAMILY = MiniCPMV
