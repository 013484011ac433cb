"""Kimi K2.5: MoonViT at native resolution, latent attention and a mixture of experts in the language model, Kimi's conversation.

An image is never enlarged: it shrinks to the patches that `pixels.max` allows and is padded with black to whole tokens. Coordinates
are written in thousandths of the image. Videos are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from terrace.families.checks import complete, language_rules
from terrace.families.interface import MAX_ASPECT_RATIO, Bounds, Family, Finding, Picture, Piece, View
from terrace.families.qwen2_vl import cut_patches, joined_patches, qwen_language
from terrace.families.shapes import ExpertsShape, LatentShape, ModelShape, ProjectorShape, VisionShape, encoder_block

PATCH, MERGE = 14, 2
SIDE = PATCH * MERGE
MOST_PATCHES_OF_A_SIDE = 512
COORDINATE_SCALE = 1000
BALANCE = 0.001  # of each sequence, where the configuration states no `aux_loss_alpha`
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_IMAGE = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"


@dataclass(frozen=True)
class KimiK25(Family):
    """Facts of an image: its grid (1, rows, columns) in patches, padding among them, and (height, width) without the padding."""

    name: ClassVar[str] = "kimi_k25"
    marks: ClassVar[Mapping[str, str]] = {
        "end_of_text": "[EOS]", "end_of_turn": "<|im_end|>", "system": "<|im_system|>", "user": "<|im_user|>",
        "assistant": "<|im_assistant|>", "middle": "<|im_middle|>", "media_begin": "<|media_begin|>",
        "media_content": "<|media_content|>", "media_end": "<|media_end|>", "image": "<|media_pad|>",
    }  # fmt: skip
    after: ClassVar[tuple[str, ...]] = ("media_end",)
    never: ClassVar[tuple[str, ...]] = (
        "image", "media_begin", "media_content", "media_end", "system", "user", "assistant", "middle"
    )  # fmt: skip
    fact_count: ClassVar[int] = 5
    experts: ClassVar[bool] = True
    balances_sequences: ClassVar[bool] = True
    token_fields: ClassVar[Mapping[str, str]] = {
        "image_token_id": "image", "vision_start_token_id": "media_begin", "vision_end_token_id": "media_end"
    }  # fmt: skip
    chat_template: ClassVar[str] = (
        "{% for message in messages %}<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}" + _IMAGE + "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}"
        "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
    )

    # ------------------------------------------------------------ an image

    @property
    def row_values(self) -> int:
        return 3 * PATCH * PATCH

    @property
    def unit(self) -> int:
        return SIDE * SIDE

    @property
    def shown_grid(self) -> int:
        return SIDE

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        shrunk = shrunk_size(height, width, pixels[1])
        rows, columns = (-(-side // SIDE) * MERGE for side in shrunk)
        size, scale = (rows * PATCH, columns * PATCH), (COORDINATE_SCALE, COORDINATE_SCALE)
        return View(rows * columns // MERGE**2, rows * columns, (1, rows, columns, *shrunk), size, scale)

    def largest_image_tokens(self, most_pixels: int) -> int:
        return _largest_image_tokens(most_pixels)

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        height, width = view.facts[3:]
        canvas = np.zeros((3, *view.size), np.uint8)
        canvas[:, :height, :width] = picture.planes(height, width)
        return cut_patches(canvas, PATCH, 1, out)

    def pictures_of(self, rows: np.ndarray, facts: Sequence[int]) -> np.ndarray:
        return joined_patches(rows, int(facts[1]) * PATCH, int(facts[2]) * PATCH, PATCH, 1)[None]

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return [(int(facts[1]), int(facts[2]))]

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        return 1, int(facts[1]) // MERGE, int(facts[2]) // MERGE

    # ------------------------------------------------------------ text

    def heading(self, number: int) -> Iterator[Piece]:
        yield "mark", "media_begin", False
        yield "text", "image", False
        yield "mark", "media_content", False

    def heading_tokens(self, number: int) -> int:
        return 2 + len("image")

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        if role not in ROLES:
            raise ValueError(f"Kimi's form has no turn of role {role!r}")
        yield "mark", role, False
        yield "text", role, False
        yield "mark", "middle", False
        yield from content
        yield "mark", "end_of_turn", supervised

    def generation(self) -> Iterator[Piece]:
        yield "mark", "assistant", False
        yield "text", "assistant", False
        yield "mark", "middle", False

    # ------------------------------------------------------------ configuration

    @classmethod
    def balance_weight(cls, config: Mapping[str, Any]) -> float:
        return float((config.get("text_config") or {}).get("aux_loss_alpha", BALANCE))

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, text = config["vision_config"], config["text_config"]
        language = qwen_language(config, vocabulary, attention_biases=False)
        latent = LatentShape(
            text.get("q_lora_rank") or 0, text["kv_lora_rank"], text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
        )
        experts = ExpertsShape(
            _experts(text), text["num_experts_per_tok"], text["moe_intermediate_size"],
            shared=text.get("n_shared_experts", 1) * text["moe_intermediate_size"],
            dense_layers=min(text.get("first_k_dense_replace", 3), text["num_hidden_layers"]), biases=_experts(text),
        )  # fmt: skip
        width, inner, values = vision["hidden_size"], vision["intermediate_size"], 3 * PATCH**2
        places = vision.get("pos_emb_height", 64) * vision.get("pos_emb_width", 64)
        merged = width * MERGE**2
        return ModelShape(
            VisionShape(
                depth=vision["num_hidden_layers"], width=width, intermediate=inner, heads=vision["num_attention_heads"], gated=False,
                window=None, full_blocks=vision["num_hidden_layers"], patch_values=values, patches_per_token=MERGE**2,
                block_parameters=encoder_block(width, inner), other_parameters=values * width + width + places * width + 2 * width,
            ),
            ProjectorShape(
                2 * width + merged * merged + merged + merged * language.width + language.width, merged * (merged + language.width), merged
            ),
            language.with_latent(latent, experts),
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer)
        if "tie_word_embeddings" not in config:
            yield (), "needs `tie_word_embeddings`: transformers' class ties where nothing is said, the published models do not"
        text, vision, at = config.get("text_config"), config.get("vision_config"), ("text_config",)
        if isinstance(text, dict):
            written = {**text, "n_routed_experts": _experts(text)}
            fields = (
                "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group", "kv_lora_rank",
                "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            )  # fmt: skip
            if (yield from complete(written, fields, at)):
                yield from _expert_rules(written, at)
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        at = ("vision_config",)
        if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
            return
        for field, value in {"patch_size": PATCH, "merge_kernel_size": [MERGE, MERGE]}.items():
            found = vision.get(field, value)
            if (list(found) if isinstance(found, list | tuple) else found) != value:
                yield (*at, field), f"{found}: this platform's preprocessing is made for {value}"
        if vision["hidden_size"] % (vision["num_attention_heads"] * 4):
            yield (*at, "num_attention_heads"), f"{vision['hidden_size']} / {vision['num_attention_heads']} heads is no multiple of 4"
        if config.get("projection_hidden_size", 1152) != vision["hidden_size"]:
            yield ("projection_hidden_size",), f"must be the tower's hidden_size {vision['hidden_size']}"

    def check_pixels(self, low: int, high: int) -> Iterator[Finding]:
        if high < self.unit:
            yield ("max",), f"{high} pixels hold no image: the smallest grid is {SIDE} x {SIDE} = {self.unit} pixels"
        yield from super().check_pixels(low, high)

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        most = MOST_PATCHES_OF_A_SIDE
        return {
            "image_processor_type": "Kimi_K25ImageProcessor", "processor_class": "Kimi_K25Processor", "do_resize": True,
            "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"max_height": most, "max_width": most},
            "max_patches": pixels[1] // PATCH**2, "patch_size": PATCH, "merge_size": MERGE,
        }  # fmt: skip

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return self.unit, int(values["max_patches"]) * PATCH**2

    def processor(self) -> dict[str, Any]:
        return {"processor_class": "Kimi_K25Processor"}


def _experts(text: Mapping[str, Any]) -> Any:
    """Published as `n_routed_experts`; a configuration of transformers 5 knows `num_local_experts` as well."""
    return text.get("n_routed_experts") or text.get("num_local_experts")


def _expert_rules(text: Mapping[str, Any], at: tuple[str, ...]) -> Iterator[Finding]:
    groups, experts = text["n_group"], text["n_routed_experts"]
    if experts % groups or text["topk_group"] > groups:
        yield (*at, "n_group"), f"{experts} experts in {groups} groups, of which {text['topk_group']} are looked at, do not fit"
    elif text["num_experts_per_tok"] > experts // groups * text["topk_group"] or experts // groups < 2:
        yield (*at, "num_experts_per_tok"), f"{text['num_experts_per_tok']} experts of a token do not fit into {text['topk_group']} groups"
    if text.get("attention_bias"):
        yield (*at, "attention_bias"), "must be false"


def shrunk_size(height: int, width: int, most_pixels: int) -> tuple[int, int]:
    """(height, width) to which a picture is resized, before padding: never enlarged; patches are counted rounded down."""
    if height < 1 or width < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"aspect ratio of {width}x{height} is above {MAX_ASPECT_RATIO}")
    count = max(1, height // PATCH) * max(1, width // PATCH)
    longest = MOST_PATCHES_OF_A_SIDE * PATCH
    scale = min(1.0, math.sqrt(most_pixels // PATCH**2 / count), longest / height, longest / width)
    return tuple(min(max(1, int(side * scale)), longest) for side in (height, width))


@lru_cache(maxsize=64)
def _largest_image_tokens(most_pixels: int) -> int:
    """The most among pictures of every aspect: padding is more than `most_pixels` says."""
    most = 0
    for aspect in np.exp(np.linspace(-5, 5, 1001)):
        for area in (1.0, 1.2, 1.5, 2.0, 4.0):
            height, width = (max(1, round(math.sqrt(area * most_pixels * share))) for share in (aspect, 1 / aspect))
            most = max(most, math.prod(-(-side // SIDE) for side in shrunk_size(height, width, most_pixels)))
    return most


FAMILY = KimiK25
