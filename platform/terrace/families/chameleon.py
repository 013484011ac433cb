"""Chameleon: pictures become tokens of the one vocabulary that text has, and where a picture is part of what is learned, so are they.

A VQ encoder (part `vision`, which never trains) gives each of 32 x 32 places of a picture one of its codes, a row of the embedding and
of the output layer. In the sequence stand placeholders, whose number no resolution changes; which codes they are, the device finds out.
A running text learns its pictures, a conversation those of its answers. The configuration is flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.errors import InputError
from terrace.families.checks import complete
from terrace.families.interface import Bounds, Finding, Picture, Piece, View
from terrace.families.one_tile import OneTile
from terrace.families.qwen2_vl import qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape, VisionShape
from terrace.families.tiles import cut_tiles
from terrace.families.tools import refuse_tools

TEXT_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
VISION_FIELDS = ("embed_dim", "num_embeddings", "latent_channels", "resolution", "base_channels", "num_res_blocks")
STEP = 0.0078  # of a grey level in what the encoder reads, as published: from -1 to 0.989


@dataclass(frozen=True)
class Chameleon(OneTile):
    """`patch` is the side of the square that one code stands for."""

    name: ClassVar[str] = "chameleon"
    flat: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("vision", "language")
    untrained: ClassVar[tuple[str, ...]] = ("vision",)
    marks: ClassVar[Mapping[str, str]] = {
        "start": "<s>", "end_of_turn": "</s>", "separator": "<reserved08706>", "image": "<image>", "image_start": "<racm3:break>",
        "image_end": "<eoss>",
    }  # fmt: skip
    before: ClassVar[tuple[str, ...]] = ("image_start",)
    after: ClassVar[tuple[str, ...]] = ("image_end",)
    beginning: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    end_of_text: ClassVar[str] = "end_of_turn"
    never: ClassVar[tuple[str, ...]] = ("start", "separator", "image", "image_start", "image_end")
    token_fields: ClassVar[Mapping[str, str]] = {}
    unshared: ClassVar[str] = "the codes that its placeholders stand for are targets of other ranks' tokens"
    mean: ClassVar[tuple[float, ...]] = (1 / (255 * STEP),) * 3
    std: ClassVar[tuple[float, ...]] = (1 / (255 * STEP),) * 3
    image_processor: ClassVar[str] = "ChameleonImageProcessor"
    processor_class: ClassVar[str] = "ChameleonProcessor"
    chat_template: ClassVar[str] = (
        "<s>{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>{% elif item['type'] == 'text' %}{{ item['text'] }}"
        "{% endif %}{% endfor %}{% endif %}{{ '<reserved08706>' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    )

    side: int = 512
    patch: int = 16

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Chameleon:
        encoder = config.get("vq_config") or {}
        return cls(encoder.get("resolution", 512), 2 ** (len(encoder.get("channel_multiplier") or (1, 1, 2, 2, 4)) - 1))

    @classmethod
    def completed(cls, config: Mapping[str, Any], token_id: Callable[[str], int | None], size: int) -> dict[str, Any]:
        """With `vocabulary_map`: the tokenizer's own codes, or as many rows behind its vocabulary."""
        codes = int((config.get("vq_config") or {}).get("num_embeddings", 8192))
        known = [token_id(code_name(code)) for code in range(codes)]
        if None in known:
            known = list(range(size, size + codes))
        image = token_id(cls.marks["image"])
        rows = {"<image>": max(known) + 1 if image is None else image, **{code_name(code): row for code, row in enumerate(known)}}
        needed = max(rows.values()) + 1
        if config.get("vocab_size", needed) < needed:
            told = f"{config['vocab_size']} has no room for {codes} codes of pictures: {needed} are needed"
            raise InputError(f"model.config.vocab_size: {told}")
        return {"vocab_size": needed, **config, "vocabulary_map": rows}

    @classmethod
    def unsaid(cls, config: Any) -> set[int]:
        """Codes of pictures are never said in an answer of text."""
        return {row for name, row in config.vocabulary_map.items() if name.startswith("IMGIMG")}

    # ------------------------------------------------------------ an image

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        """The shorter edge resized to the square's side by Pillow's Lanczos filter, the middle cut out."""
        side, shorter = self.side, min(picture.height, picture.width)
        height, width = (side if size == shorter else int(side * size / shorter) for size in (picture.height, picture.width))
        top, left = (height - side) // 2, (width - side) // 2
        planes = picture.resampled(height, width).planes(height, width)[:, top : top + side, left : left + side]
        rows = cut_tiles(planes, side)
        if out is None:
            return rows
        out[...] = rows
        return out

    def coordinate(self, value: float, axis: int, size: tuple[int, int], view: View) -> int:
        return super().coordinate(_in_the_middle(value, axis, size), 0, (min(size), min(size)), view)

    def coordinates(self, values: np.ndarray, axes: np.ndarray, widths: np.ndarray, heights: np.ndarray, costs: Any) -> np.ndarray:
        shorter = np.minimum(widths, heights)
        shifted = np.asarray(values, np.float64) - (np.where(axes == 0, widths, heights) - shorter) / 2
        return super().coordinates(shifted, axes, shorter, shorter, costs)

    def shown_coordinate(self, value: float, axis: int, size: tuple[int, int], shown: tuple[int, int]) -> int:
        return super().shown_coordinate(_in_the_middle(value, axis, size), axis, (min(size), min(size)), shown)

    # ------------------------------------------------------------ text

    def plain_turns(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        messages = refuse_tools(messages, self.name)
        if any(message["role"] not in ("user", "assistant") for message in messages):
            raise ValueError("Chameleon's form has questions and answers only: write what a system turn says into the first question")
        return messages

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        yield from _learned(content, supervised)
        yield "mark", "end_of_turn" if role == "assistant" else "separator", supervised

    def running(self, content: Iterable[Piece]) -> Iterator[Piece]:
        pieces = list(content)
        return _learned(pieces, any(supervised for _, _, supervised in pieces))

    def generation(self) -> Iterator[Piece]:
        return iter(())

    # ------------------------------------------------------------ configuration

    @classmethod
    def resized(cls, config: Mapping[str, Any], side: int) -> None:
        """Its encoder is convolutions."""

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        family = cls.of(config)
        parameters, products = _encoder(config["vq_config"])
        tower = VisionShape(
            depth=0, width=1, intermediate=0, heads=1, gated=False, window=None, full_blocks=0, patch_values=products // family.tokens,
            patches_per_token=1, block_parameters=0, other_parameters=parameters, unused_parameters=parameters,
        )  # fmt: skip
        language = qwen_language(config, vocabulary, attention_biases=False, scaled_heads=True)
        return ModelShape(tower, ProjectorShape(0, 0, 0), language)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        if (yield from complete(config, TEXT_FIELDS, ())) and config["hidden_size"] % config["num_attention_heads"]:
            yield ("num_attention_heads",), f"{config['num_attention_heads']} heads do not divide {config['hidden_size']}"
        if not isinstance(encoder := config.get("vq_config"), dict):
            yield (), "needs `vq_config`, a map of the picture encoder's fields"
        elif (yield from complete(encoder, VISION_FIELDS, ("vq_config",))) and encoder.get("double_latent"):
            yield ("vq_config", "double_latent"), "must be false"
        for field in ("attention_bias", "mlp_bias", "attention_dropout"):
            if config.get(field):
                yield (field,), "must be left out"

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return super().preprocessor(pixels) | {
            "do_center_crop": True, "size": {"shortest_edge": self.side}, "crop_size": {"height": self.side, "width": self.side},
            "resample": 1, "rescale_factor": STEP, "image_mean": [1.0] * 3, "image_std": [1.0] * 3,
        }  # fmt: skip

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return (int(values["size"]["shortest_edge"]) ** 2,) * 2

    def processor(self) -> dict[str, Any]:
        return {"processor_class": self.processor_class, "image_seq_length": self.tokens}


def code_name(code: int) -> str:
    """The token of a picture's code, as the published vocabulary spells it: a letter for each digit."""
    return f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z"


def _in_the_middle(value: float, axis: int, size: tuple[int, int]) -> float:
    """A coordinate in the square that is cut out of the middle."""
    return value - (size[axis] - min(size)) / 2


def _learned(content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
    """The pieces, with pictures and the marks around them learned as the text is."""
    for kind, value, flag in content:
        yield kind, value, supervised if kind in ("image", "mark") else flag


def _encoder(encoder: Mapping[str, Any]) -> tuple[int, int]:
    """Parameters of the picture encoder, and multiply-adds for one picture."""
    base, blocks, side = encoder["base_channels"], encoder["num_res_blocks"], encoder["resolution"]
    widths = [base * factor for factor in encoder.get("channel_multiplier") or (1, 1, 2, 2, 4)]
    attended, latent, codes = encoder.get("attn_resolutions") or (), encoder["latent_channels"], encoder["num_embeddings"]
    parameters = products = 0

    def convolution(into: int, out: int, kernel: int, places: int) -> None:
        nonlocal parameters, products
        parameters, products = parameters + into * out * kernel**2 + out, products + into * out * kernel**2 * places

    def norm(width: int) -> None:
        nonlocal parameters
        parameters += 2 * width

    def residual(into: int, out: int, places: int) -> None:
        norm(into)
        convolution(into, out, 3, places)
        norm(out)
        convolution(out, out, 3, places)
        if into != out:
            convolution(into, out, 1, places)

    def attention(width: int, places: int) -> None:
        nonlocal products
        norm(width)
        for _ in range(4):
            convolution(width, width, 1, places)
        products += 2 * places * places * width

    width = base
    convolution(3, base, 3, side * side)
    for level, out in enumerate(widths):
        for _ in range(blocks):
            residual(width, out, side * side)
            width = out
            if side in attended:
                attention(width, side * side)
        if level + 1 < len(widths):
            side //= 2
            convolution(width, width, 3, side * side)
    residual(width, width, side * side)
    if encoder.get("attn_type", "vanilla") == "vanilla":
        attention(width, side * side)
    residual(width, width, side * side)
    norm(width)
    convolution(width, latent, 3, side * side)
    convolution(latent, encoder["embed_dim"], 1, side * side)
    parameters += latent * encoder["embed_dim"] + latent  # back from a code, which nothing here does
    parameters, products = parameters + codes * encoder["embed_dim"], products + side * side * codes * encoder["embed_dim"]
    return parameters, products


FAMILY = Chameleon
