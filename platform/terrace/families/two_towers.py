"""What models of two towers share: one tower reads a picture, the other a text, and each gives one vector of a common width.

A sample is one picture and its caption. No placeholder stands for the picture in the text, so a sample's length is that of
its text and its marks, at most the positions of the text tower; there is no conversation and nothing is generated. The parts
are `vision` and `language` (the two towers) and `projector`: what maps both to the common width, temperature and bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from terrace.families.checks import complete, head_count_fits
from terrace.families.interface import Finding, Piece
from terrace.families.one_square import Squares
from terrace.families.shapes import LanguageShape, ModelShape, ProjectorShape, VisionShape, encoder_block

TOWER_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class TwoTowers(Squares):
    """Every picture becomes one square; its fact is the number of squares, 1. `context` is the positions of the text tower."""

    gives: ClassVar[str] = "vectors"
    end_of_turn: ClassVar[str] = "end_of_text"
    keeps_end: ClassVar[bool] = True
    text_fields: ClassVar[Mapping[str, str]] = {"pad_token_id": "end_of_text"}

    context: int = 64

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TwoTowers:
        vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
        return cls(
            int(vision.get("image_size") or cls.side), int(vision.get("patch_size") or cls.patch),
            int(text.get("max_position_embeddings") or cls.context),
        )  # fmt: skip

    # ------------------------------------------------------------ text

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        raise ValueError(f"{self.name} reads captions and no conversation; give rows with a picture and its caption")

    def generation(self) -> Iterator[Piece]:
        raise ValueError(f"{self.name} gives vectors and no answers")

    def check_length(self, tokens: int) -> Iterator[str]:
        if tokens > self.context:
            yield (
                f"{tokens} tokens are more than the {self.context} positions of the text tower; give {self.context} or fewer"
                " (`too_long: truncate_text` of a source cuts longer captions and keeps their end mark)"
            )

    # ------------------------------------------------------------ configuration

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        text_fields = (*TOWER_FIELDS, "max_position_embeddings") + (() if trained_tokenizer else ("vocab_size",))
        for name, wanted in (("vision_config", (*TOWER_FIELDS, *cls.picture_fields())), ("text_config", text_fields)):
            part, at = config.get(name), (name,)
            if not isinstance(part, dict):
                yield (), f"needs `{name}`, a map of shape fields"
                continue
            if not (yield from complete(part, wanted, at)):
                continue
            yield from head_count_fits(part, at)
            if part.get("attention_dropout"):
                yield (*at, "attention_dropout"), "must be 0: a step runs the towers twice, and both passes must agree"
            if "image_size" in wanted and part["image_size"] % part["patch_size"]:
                yield (*at, "image_size"), f"{part['image_size']} is no multiple of patch_size {part['patch_size']}"

    @classmethod
    def picture_fields(cls) -> tuple[str, ...]:
        """Fields of the vision configuration beside those of any tower."""
        return ("image_size", "patch_size")


def vision_shape(
    vision: Mapping[str, Any], patches: int, other_parameters: int, extra_tokens: int = 0, unused: int = 0, missing_biases: int = 0
) -> VisionShape:
    """A plain tower. One visual token is a whole picture: what the projector runs for. `missing_biases` of each block."""
    depth = int(vision["num_hidden_layers"])
    return VisionShape(
        depth=depth, width=int(vision["hidden_size"]), intermediate=int(vision["intermediate_size"]),
        heads=int(vision["num_attention_heads"]), gated=False, window=None, full_blocks=depth,
        patch_values=3 * int(vision["patch_size"]) ** 2, patches_per_token=patches,
        block_parameters=encoder_block(int(vision["hidden_size"]), int(vision["intermediate_size"])) - missing_biases,
        other_parameters=other_parameters, extra_tokens=extra_tokens,
        unused_parameters=unused,
    )  # fmt: skip


def text_shape(text: Mapping[str, Any], vocabulary: int | None, head_parameters: int = 0) -> LanguageShape:
    """A text tower: token and position embeddings, blocks, a final LayerNorm, and what follows it."""
    width, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    return LanguageShape(
        layers=int(text["num_hidden_layers"]), width=width, intermediate=int(text["intermediate_size"]), heads=heads, key_heads=heads,
        head_size=width // heads, vocabulary=int(text.get("vocab_size") or vocabulary or 0), tied=True, attention_biases=True, gated=False,
        layer_biases=4 * width + int(text["intermediate_size"]),  # of attention's output, the feed-forward and two norms
        other_biases=int(text["max_position_embeddings"]) * width + width + head_parameters,  # positions, and the final norm's own
    )  # fmt: skip


def towers_shape(vision: VisionShape, language: LanguageShape, parameters: int, products: int) -> ModelShape:
    """`parameters` and `products` (per pair) of what stands between the towers and the common width."""
    return ModelShape(vision, ProjectorShape(parameters, products, 0), language)
