"""Idefics, the open Flamingo: gated layers between those of a language model read the last picture before each token.

One placeholder stands for a picture in the text; what the tower and the Perceiver resampler make of it never enters the sequence. A token
sees the latents of the last picture before it in its sample, as Flamingo's do, and those before the first picture see none.
The configuration is flat. The part `projector` is the resampler and the gated layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from terrace.families.checks import complete
from terrace.families.idefics3 import template
from terrace.families.interface import Finding, Piece
from terrace.families.one_tile import OneTile
from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD, qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape, VisionShape, encoder_block

TEXT_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION_FIELDS = ("embed_dim", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
LATENT_FIELDS = ("resampler_n_latents", "resampler_depth", "resampler_n_heads", "resampler_head_dim")


@dataclass(frozen=True)
class Idefics(OneTile):
    name: ClassVar[str] = "idefics"
    flat: ClassVar[bool] = True
    crosses: ClassVar[bool] = True
    unshared: ClassVar[str] = "its pictures are read by cross-attention, which is not split here"
    marks: ClassVar[Mapping[str, str]] = {
        "start": "<s>", "end_of_text": "</s>", "end_of_turn": "<end_of_utterance>", "image": "<image>",
        "around_image": "<fake_token_around_image>",
    }  # fmt: skip
    before: ClassVar[tuple[str, ...]] = ("around_image",)
    after: ClassVar[tuple[str, ...]] = ("around_image",)
    beginning: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    never: ClassVar[tuple[str, ...]] = ("start", "image", "around_image")
    answer_prefix: ClassVar[str] = " "
    refused_objectives: ClassVar[Mapping[str, str]] = {
        "mtp": "a further block would need pictures of its own; use medusa",
    }
    mean: ClassVar[tuple[float, ...]] = IMAGE_MEAN
    std: ClassVar[tuple[float, ...]] = IMAGE_STD
    image_processor: ClassVar[str] = "IdeficsImageProcessor"
    processor_class: ClassVar[str] = "IdeficsProcessor"
    chat_template: ClassVar[str] = template("<s>").replace(
        "<image>", "<fake_token_around_image><image><fake_token_around_image>"
    )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Idefics:
        vision = config.get("vision_config") or {}
        return cls(vision.get("image_size", 224), vision.get("patch_size", 14))

    @property
    def tokens(self) -> int:
        """One placeholder."""
        return 1

    # ------------------------------------------------------------ a conversation

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        pieces = list(content)
        opened = bool(pieces) and pieces[0][0] == "mark"  # with a picture
        yield "text", f"{role.capitalize()}:", False
        if not opened:
            yield "text", " ", supervised and role == "assistant"
        yield from _sharing(pieces)
        yield "mark", "end_of_turn", supervised
        yield "text", "\n", False

    def running(self, content: Iterable[Piece]) -> Iterator[Piece]:
        return _sharing(content)

    def generation(self) -> Iterator[Piece]:
        yield "text", "Assistant:", False

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, family = config["vision_config"], cls.of(config)
        width, inner, depth, values = vision["embed_dim"], vision["intermediate_size"], vision["num_hidden_layers"], 3 * family.patch**2
        seen = family.patches + 1
        tower = VisionShape(
            depth=depth, width=width, intermediate=inner, heads=vision["num_attention_heads"], gated=False, window=None,
            full_blocks=depth, patch_values=values, patches_per_token=family.patches, block_parameters=encoder_block(width, inner),
            extra_tokens=1, kept_inner=2, other_parameters=values * width + width + seen * width + 4 * width, unused_parameters=2 * width,
        )  # fmt: skip
        return ModelShape(tower, _crossing(config, width, seen), qwen_language(config, vocabulary, attention_biases=False))

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        wanted = TEXT_FIELDS if trained_tokenizer else (*TEXT_FIELDS, "vocab_size")
        if (yield from complete(config, wanted, ())):
            if config["hidden_size"] % config["num_attention_heads"]:
                yield ("num_attention_heads",), f"{config['num_attention_heads']} heads do not divide {config['hidden_size']}"
            if config["num_hidden_layers"] % config.get("cross_layer_interval", 1):
                told = f"{config['cross_layer_interval']} does not divide the {config['num_hidden_layers']} layers"
                yield ("cross_layer_interval",), told
        for name, fields in (("vision_config", VISION_FIELDS), ("perceiver_config", LATENT_FIELDS)):
            if not isinstance(part := config.get(name), dict):
                yield (), f"needs `{name}`, a map of shape fields"
            else:
                yield from complete(part, fields, (name,))
        if config.get("use_resampler") is not True:
            yield ("use_resampler",), "must be true: pictures reach the gated layers through the Perceiver resampler here"
        if config.get("additional_vocab_size"):
            yield ("additional_vocab_size",), "must be 0: add it to vocab_size (weights of both matrices are put together when they load)"
        if config.get("dropout"):
            yield ("dropout",), "must be 0: packed attention has no dropout"

    def processor(self) -> dict[str, Any]:
        return {"processor_class": self.processor_class, "image_size": self.side}


def _sharing(content: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, with one mark between neighbouring pictures instead of two."""
    marked = False
    for piece in content:
        is_mark = piece[:2] == ("mark", "around_image")
        if not (is_mark and marked):
            yield piece
        marked = is_mark and not marked


def _crossing(config: Mapping[str, Any], vision: int, seen: int) -> ProjectorShape:
    """The resampler over `seen` vectors of the tower, and the gated layers."""
    latent, hidden, inner = config["perceiver_config"], config["hidden_size"], config["intermediate_size"]
    count, depth, heads, size = (latent[name] for name in LATENT_FIELDS)
    span, wide = heads * size, 4 * vision
    norms = 4 * size if latent.get("qk_layer_norms_perceiver") else 0
    block = 4 * vision + norms + 4 * vision * span + 2 * vision + 2 * vision * wide
    layers = config["num_hidden_layers"] // config.get("cross_layer_interval", 1)
    gates = 2 * hidden if config.get("alpha_type", "float") == "vector" else 2
    layer = 2 * hidden * hidden + 2 * vision * hidden + 3 * hidden * inner + 2 * hidden + gates
    layer += 2 * (hidden // config["num_attention_heads"]) if config.get("qk_layer_norms") else 0
    products = depth * (2 * seen * vision * span + count * (4 * vision * span + 2 * (seen + count) * span + 2 * vision * wide))
    kept = depth * ((seen + count) * (2 * vision + 2 * span + heads * count) + count * (5 * vision + 2 * span + 2 * wide))
    return ProjectorShape(
        parameters=count * vision + depth * block + 2 * vision + layers * layer,
        products=products + layers * 2 * count * vision * hidden, inner=(kept + layers * 2 * count * hidden) // 3,
        text_products=layers * (2 * hidden * hidden + 2 * count * hidden + 3 * hidden * inner),
        text_kept=layers * (10 * hidden + 5 * inner),
    )  # fmt: skip


FAMILY = Idefics
