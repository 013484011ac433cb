"""What encoders of text alone share: every token sees all of its sample, and what the model gives is the tokens that stand under masks.

There is one part, `language`. A sample reads as its start mark, its text and its end mark; each turn of a conversation ends with that
mark, too. Pictures of a source are read by nobody, so a source of captions serves as one of texts. A document that is cut up has the
marks where it begins and ends, and none where it was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from terrace.families.checks import complete, head_count_fits
from terrace.families.interface import Bounds, Family, Finding, Picture, Piece, View
from terrace.families.shapes import NO_VISION, LanguageShape, ModelShape, ProjectorShape
from terrace.families.two_towers import TOWER_FIELDS, text_shape

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
NOT_HERE = {"is_decoder": True, "add_cross_attention": True, "tie_word_embeddings": False}  # values of fields that make another model
PICTURE_TOKENS = "a text encoder reads no pictures"


@dataclass(frozen=True)
class TextEncoder(Family):
    """`context` is the positions that a sample may take. A subclass says its marks: `start`, `end_of_text`, `mask` and `pad`."""

    gives: ClassVar[str] = "tokens"
    parts: ClassVar[tuple[str, ...]] = ("language",)
    reads_pictures: ClassVar[bool] = False
    flat: ClassVar[bool] = True
    beginning: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    end_of_turn: ClassVar[str] = "end_of_text"
    token_fields: ClassVar[Mapping[str, str]] = {}
    text_fields: ClassVar[Mapping[str, str]] = {"pad_token_id": "pad"}
    token_names: ClassVar[Mapping[str, str]] = {
        "cls_token": "start", "sep_token": "end_of_text", "mask_token": "mask", "pad_token": "pad",
    }  # fmt: skip
    passed_positions: ClassVar[bool] = False  # positions up to that of the padding are nobody's

    context: int = 512

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TextEncoder:
        positions = int(config.get("max_position_embeddings") or cls.context)
        return cls(positions - (int(config.get("pad_token_id") or 1) + 1 if cls.passed_positions else 0))

    # ------------------------------------------------------------ pictures, which nobody reads

    @property
    def row_values(self) -> int:
        return 3

    @property
    def unit(self) -> int:
        return 1

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        return View(0, 0, (0,), (height, width), (height, width))

    def largest_image_tokens(self, most_pixels: int) -> int:
        return 0

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        raise ValueError(PICTURE_TOKENS)

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return []

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {}

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        raise KeyError(PICTURE_TOKENS)

    # ------------------------------------------------------------ text

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        yield from content
        yield "mark", self.end_of_turn, supervised

    def generation(self) -> Iterator[Piece]:
        raise ValueError(f"{self.name} fills masked tokens and gives no answers")

    def check_length(self, tokens: int) -> Iterator[str]:
        if tokens > self.context:
            yield f"{tokens} tokens are more than the {self.context} positions of a sample in {self.name}; give {self.context} or fewer"

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        return ModelShape(NO_VISION, ProjectorShape(0, 0, 0), encoder_shape(config, vocabulary, filled=True))

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from encoder_rules(config, (), trained_tokenizer)

    @classmethod
    def completed(cls, config: Mapping[str, Any], token_id: Any, size: int) -> dict[str, Any]:
        return without_dropout(config)


def without_dropout(config: Mapping[str, Any]) -> dict[str, Any]:
    """A written configuration whose class would draw dropout where nothing is said of it."""
    return dict.fromkeys(DROPOUTS, 0.0) | dict(config)


def encoder_rules(config: Mapping[str, Any], at: tuple[str, ...], trained_tokenizer: bool) -> Iterator[Finding]:
    """What is wrong with the configuration of a text encoder, which stands at `at`."""
    wanted = (*TOWER_FIELDS, "max_position_embeddings") + (() if trained_tokenizer else ("vocab_size",))
    if not (yield from complete(config, wanted, at)):
        return
    yield from head_count_fits(config, at)
    for name in DROPOUTS:
        if config.get(name):
            yield (*at, name), "must be 0: chance of a process's own would come out differently on other workers"
    for name, value in NOT_HERE.items():
        if config.get(name) is value:
            yield (*at, name), f"must be {str(not value).lower()}: every token sees all others, and is told by its own embedding"


def encoder_shape(config: Mapping[str, Any], vocabulary: int | None, filled: bool) -> LanguageShape:
    """Blocks behind embeddings with a LayerNorm. `filled`: what fills masked tokens stands behind them, else the pooler."""
    width, size = int(config["hidden_size"]), int(config.get("vocab_size") or vocabulary or 0)
    types = int(config.get("type_vocab_size", 2)) * width
    behind = width * width + width + (2 * width + size if filled else 0)  # a layer; its LayerNorm and a bias of every token
    # Two norms of the embeddings' width are counted for a tower of two towers, scale and shift of the last one: here of the first.
    return replace(text_shape(config, vocabulary, types + behind), head_products=width * width if filled else 0)
