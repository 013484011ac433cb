"""Qwen2-VL: native resolution, 14-pixel patches merged 2x2, M-RoPE positions, ChatML. Qwen2.5-VL and Qwen3-VL build on it.

`smart_resize` gives exactly the sizes of transformers' Qwen2-VL image processor; the vectorised form gives the same
numbers for a whole index (4 million images per second) and is tested against the scalar one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.chatml import MARKS, ChatML, chat_template
from terrace.families.checks import complete, language_rules, whole
from terrace.families.configurations import language_config
from terrace.families.interface import MAX_ASPECT_RATIO, Bounds, Costs, Finding, Picture, View, Visual
from terrace.families.shapes import LanguageShape, ModelShape, ProjectorShape, VisionShape

TEMPORAL_PATCH_SIZE = 2  # frames of one temporal patch; a still image fills both
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"
TEMPLATE = chat_template(
    f"{_VISION_START}<|image_pad|>{_VISION_END}", f"{_VISION_START}<|video_pad|>{_VISION_END}", "You are a helpful assistant."
)


@dataclass(frozen=True)
class Qwen2VL(ChatML):
    """Facts of an image: its grid (t, h, w) in patches. A video has two rows of pixels per patch, one for each frame."""

    name: ClassVar[str] = "qwen2_vl"
    marks: ClassVar[Mapping[str, str]] = {
        **MARKS, "vision_start": _VISION_START, "vision_end": _VISION_END, "image": "<|image_pad|>", "video": "<|video_pad|>"
    }  # fmt: skip
    before: ClassVar[tuple[str, ...]] = ("vision_start",)
    after: ClassVar[tuple[str, ...]] = ("vision_end",)
    never: ClassVar[tuple[str, ...]] = ("image", "video", "vision_start", "vision_end", "start_of_turn")
    writes_tools: ClassVar[bool] = True
    default_system: ClassVar[str | None] = "You are a helpful assistant."
    position_rows: ClassVar[int] = 4
    fact_count: ClassVar[int] = 3
    videos: ClassVar[bool] = True
    chat_template: ClassVar[str] = TEMPLATE
    token_fields: ClassVar[Mapping[str, str]] = {
        "image_token_id": "image", "video_token_id": "video", "vision_start_token_id": "vision_start",
        "vision_end_token_id": "vision_end",
    }  # fmt: skip
    patch: ClassVar[int] = 14
    merge: ClassVar[int] = 2
    mean: ClassVar[tuple[float, ...]] = IMAGE_MEAN
    std: ClassVar[tuple[float, ...]] = IMAGE_STD
    image_processor: ClassVar[str] = "Qwen2VLImageProcessor"
    processor_class: ClassVar[str] = "Qwen2VLProcessor"

    # ------------------------------------------------------------ an image

    @property
    def side(self) -> int:
        """Sides of a resized image are multiples of this."""
        return self.patch * self.merge

    @property
    def shown_grid(self) -> int:
        return self.side

    @property
    def row_values(self) -> int:
        return 3 * self.patch * self.patch

    @property
    def unit(self) -> int:
        return self.side**2

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        new_height, new_width = smart_resize(height, width, *pixels, self.side)
        rows, columns = new_height // self.patch, new_width // self.patch
        scale = self.scale_of(new_height, new_width)
        return View(rows * columns // self.merge**2, rows * columns, (1, rows, columns), (new_height, new_width), scale)

    def costs(self, widths: np.ndarray, heights: np.ndarray, pixels: Bounds) -> Costs:
        new_heights, new_widths = smart_resize_many(heights, widths, pixels, self.side)
        tokens = (new_heights // self.side) * (new_widths // self.side)
        return Costs(tokens, tokens * self.merge**2, *self.scale_of(new_heights, new_widths))

    def scale_of(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Coordinates are written in pixels of the resized image. Elementwise."""
        return height, width

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        return cut_patches(picture.planes(*view.size), self.patch, self.merge, out)

    def pictures_of(self, rows: np.ndarray, facts: Sequence[int]) -> np.ndarray:
        time, height, width = (int(fact) for fact in facts)
        frames = len(rows) // (time * height * width)  # rows of a video's patches are pairs, one of each frame
        by_frame = rows.reshape(time, height * width, frames, self.row_values).transpose(0, 2, 1, 3)
        return np.stack([
            joined_patches(frame, height * self.patch, width * self.patch, self.patch, self.merge)
            for frame in by_frame.reshape(-1, height * width, self.row_values)
        ])  # fmt: skip

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        """The frames of a video attend within themselves: each temporal patch is a picture of its own."""
        return [(int(facts[1]), int(facts[2]))] * int(facts[0])

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        return int(facts[0]), int(facts[1]) // self.merge, int(facts[2]) // self.merge

    # ------------------------------------------------------------ videos

    def frame_pairs(self, frames: Any) -> Any:
        return np.maximum(1, (np.asarray(frames) + 1) // TEMPORAL_PATCH_SIZE)

    def video_facts(self, view: View, frames: int) -> tuple[int, ...]:
        return (int(self.frame_pairs(frames)), *view.facts[1:])

    def video_pixels(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Frames (uint8 [P, values] each) as temporal patches: rows 2k and 2k + 1 are the two frames of patch k."""
        frames = [*frames, frames[-1]] if len(frames) % TEMPORAL_PATCH_SIZE else list(frames)
        pairs = [np.stack(frames[at : at + 2], axis=1) for at in range(0, len(frames), TEMPORAL_PATCH_SIZE)]
        return np.concatenate(pairs).reshape(-1, self.row_values)

    # ------------------------------------------------------------ positions

    def temporal_steps(self, visual: Visual) -> np.ndarray:
        """int32 [t]: how far each temporal patch of a video advances the positions. One each here; by the clock in Qwen2.5-VL."""
        return np.arange(visual.facts[0], dtype=np.int32)

    def positions(self, length: int, visuals: Sequence[Visual]) -> np.ndarray:
        """int32 [4, length]: text position, then t, h, w, equal to transformers' `get_rope_index`.

        A text token has the same t, h and w. An image's tokens share one t and count rows and columns from where the
        text stopped; the text goes on after the longer side.
        """
        positions = np.empty((4, length), dtype=np.int32)
        positions[0] = np.arange(length)
        token, position = 0, 0
        for visual in visuals:
            positions[1:, token : visual.start] = np.arange(position, position + visual.start - token)
            position += visual.start - token
            frames, rows, columns = self.token_grid(visual.facts)
            end = visual.start + frames * rows * columns
            block = positions[1:, visual.start : end].reshape(3, frames, rows, columns)
            block[0] = self.temporal_steps(visual)[:, None, None]
            block[1] = np.arange(rows)[None, :, None]
            block[2] = np.arange(columns)[None, None, :]
            positions[1:, visual.start : end] = block.reshape(3, -1) + position
            position += max(rows, columns)
            token = end
        positions[1:, token:] = np.arange(position, position + length - token)
        return positions

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision = config["vision_config"]
        width, inner = vision["embed_dim"], int(vision["embed_dim"] * vision["mlp_ratio"])
        block = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width
        return cls._shape(config, vocabulary, width, inner, block, gated=False, full=vision["depth"], window=None)

    @classmethod
    def _shape(
        cls, config: Mapping[str, Any], vocabulary: int | None, width: int, inner: int, block: int, gated: bool, full: int,
        window: int | None,
    ) -> ModelShape:
        """Two-frame patches without bias, a merger of two layers, Qwen2's language model."""
        vision, values = config["vision_config"], 3 * TEMPORAL_PATCH_SIZE * cls.patch**2
        language = qwen_language(config, vocabulary, attention_biases=True)
        merged = width * cls.merge**2
        norm = width if gated else 2 * width
        projector = norm + merged * merged + merged + merged * language.width + language.width
        return ModelShape(
            VisionShape(
                depth=vision["depth"], width=width, intermediate=inner, heads=vision["num_heads"], gated=gated, window=window,
                full_blocks=full, patch_values=values, patches_per_token=cls.merge**2, block_parameters=block,
                other_parameters=values * width,
            ),
            ProjectorShape(projector, merged * (merged + language.width), merged),
            language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        fields = ("embed_dim", "mlp_ratio", "depth", "num_heads", "hidden_size")
        yield from cls._check(config, trained_tokenizer, fields, width="embed_dim", out="hidden_size")

    @classmethod
    def _check(
        cls, config: Mapping[str, Any], trained_tokenizer: bool, fields: tuple[str, ...], width: str, out: str
    ) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer, mrope=True)
        text, vision, at = config.get("text_config"), config.get("vision_config"), ("vision_config",)
        if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
            return
        fixed = {"patch_size": cls.patch, "spatial_merge_size": cls.merge, "temporal_patch_size": TEMPORAL_PATCH_SIZE}
        for field, value in fixed.items():
            if vision.get(field, value) != value:
                yield (*at, field), f"{vision[field]}: this platform's preprocessing is made for {value}"
        if vision[width] % (vision["num_heads"] * 4):
            yield (
                (*at, "num_heads"),
                f"{vision[width]} / {vision['num_heads']} heads is no multiple of 4, which 2-D rotary positions need",
            )
        window = vision.get("window_size")
        if window is not None and (not whole(window) or window % cls.unit_side()):
            yield (*at, "window_size"), f"{window} is not a multiple of {cls.unit_side()} pixels"
        for block in vision.get("fullatt_block_indexes") or []:
            if not isinstance(block, int) or not 0 <= block < vision["depth"]:
                yield (*at, "fullatt_block_indexes"), f"there is no block {block}: depth is {vision['depth']}, counted from 0"
        if isinstance(text, dict) and whole(text.get("hidden_size")) and vision[out] != text["hidden_size"]:
            yield at, f"the projector gives vectors of {vision[out]}, the language model takes {text['hidden_size']}"

    def check_pixels(self, low: int, high: int) -> Iterator[Finding]:
        unit, side = self.unit, self.side
        if high < unit:
            yield ("max",), f"{high} pixels hold no image: the smallest grid is {side} x {side} = {unit} pixels"
        yield from super().check_pixels(low, high)
        if low <= high and -(-low // unit) > high // unit:
            below, above = low // unit * unit, (high // unit + 1) * unit
            yield (), f"no grid of {side} x {side} pixels has between {low} and {high} pixels; the nearest have {below} and {above}"

    @classmethod
    def unit_side(cls) -> int:
        return cls.patch * cls.merge

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "image_processor_type": self.image_processor,
            "processor_class": self.processor_class,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "min_pixels": pixels[0],
            "max_pixels": pixels[1],
            "size": {"shortest_edge": pixels[0], "longest_edge": pixels[1]},
            "patch_size": self.patch,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "merge_size": self.merge,
        }

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        size = values.get("size") or {}
        low = values.get("min_pixels") or size["shortest_edge"]
        return int(low), int(values.get("max_pixels") or size["longest_edge"])


def qwen_language(
    config: Mapping[str, Any], vocabulary: int | None, attention_biases: bool, head_norms: bool = False, scaled_heads: bool = False
) -> LanguageShape:
    """The shape of a language model with Llama's layout: RMSNorm, rotary positions, SwiGLU, grouped heads."""
    text = language_config(config)  # published Qwen2-VL configurations are flat
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return LanguageShape(
        layers=text["num_hidden_layers"],
        width=text["hidden_size"],
        intermediate=text["intermediate_size"],
        heads=text["num_attention_heads"],
        key_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        head_size=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        vocabulary=text.get("vocab_size") or vocabulary or 0,
        tied=bool(tied),
        attention_biases=attention_biases,
        head_norms=head_norms,
        scaled_heads=scaled_heads,
    )


# ---------------------------------------------------------------- resize arithmetic, pure integers and floats


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int, side: int = 28) -> tuple[int, int]:
    """(height, width) after resizing: multiples of `side`, pixels within bounds where a grid allows it, aspect nearly kept.

    Raises ValueError for an empty image or an aspect ratio above 200, like the published processor.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"aspect ratio of {width}x{height} is above {MAX_ASPECT_RATIO}")
    new_height = round(height / side) * side
    new_width = round(width / side) * side
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(side, math.floor(height / shrink / side) * side)
        new_width = max(side, math.floor(width / shrink / side) * side)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / side) * side
        new_width = math.ceil(width * grow / side) * side
    return new_height, new_width


def smart_resize_many(heights: np.ndarray, widths: np.ndarray, pixels: Bounds, side: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """`smart_resize` of many images: int64 [I] heights and widths. The caller has refused empty and overlong images."""
    min_pixels, max_pixels = pixels
    height, width = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    area = height * width
    # np.rint rounds halves to even like Python's round; every product is below 2^53, so float64 is exact here.
    new_height, new_width = np.rint(height / side), np.rint(width / side)
    new_area = new_height * new_width * side**2
    above, below = new_area > max_pixels, new_area < min_pixels
    shrink, grow = np.sqrt(area / max_pixels), np.sqrt(min_pixels / np.maximum(area, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        smaller_height = np.maximum(1, np.floor(height / shrink / side))
        smaller_width = np.maximum(1, np.floor(width / shrink / side))
    larger_height, larger_width = np.ceil(height * grow / side), np.ceil(width * grow / side)
    new_height = np.where(above, smaller_height, np.where(below, larger_height, new_height))
    new_width = np.where(above, smaller_width, np.where(below, larger_width, new_width))
    return (new_height * side).astype(np.int64), (new_width * side).astype(np.int64)


# ---------------------------------------------------------------- patches


def cut_patches(planes: np.ndarray, patch: int, merge: int, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [3, H, W] to uint8 [P, 3 * patch * patch]: the patches of one merged token lie next to each other."""
    side = patch * merge
    rows, columns = planes.shape[1] // side, planes.shape[2] // side
    if out is None:
        out = np.empty((rows * columns * merge**2, 3 * patch * patch), np.uint8)
    blocks = planes.reshape(3, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
    out.reshape(rows, columns, merge, merge, 3, patch, patch)[...] = blocks
    return out


def joined_patches(patches: np.ndarray, height: int, width: int, patch: int, merge: int) -> np.ndarray:
    """The inverse of `cut_patches`: uint8 [height, width, 3]."""
    side = patch * merge
    blocks = patches.reshape(height // side, width // side, merge, merge, 3, patch, patch)
    return np.ascontiguousarray(blocks.transpose(0, 2, 5, 1, 3, 6, 4)).reshape(height, width, 3)


FAMILY = Qwen2VL
