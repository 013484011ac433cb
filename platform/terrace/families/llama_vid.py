"""LLaMA-VID: a picture, or a frame of a video, is one context token that depends on the question and a few content tokens that do not.

EVA's tower on the image padded to a square, InstructBLIP's Q-Former with a question, Vicuna's conversation form, as LLaVA. `content_side`
of 1 gives two tokens a frame. The question is that of the sample's first turn; a caption asks nothing. Frames are pictures that the tower
sees one by one; pictures and videos have the same placeholder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from terrace.errors import InputError
from terrace.families.blip_2 import part_rules, q_former, tower_shape
from terrace.families.checks import language_rules
from terrace.families.instructblip import FORMER_DEFAULTS, reading
from terrace.families.interface import Bounds, Finding, Piece, View
from terrace.families.llava import Llava
from terrace.families.qwen2_vl import qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape

MOST_QUESTION_TOKENS = 256  # that the Q-Former reads, as published: of a longer question the first token and the last 255


@dataclass(frozen=True)
class LlamaVid(Llava):
    """The facts of an image: its frames (1, but for a video), the tokens of its question, and their ids with zeros behind them."""

    name: ClassVar[str] = "llama_vid"
    marks: ClassVar[Mapping[str, str]] = {"video": "<image>", **Llava.marks}
    token_fields: ClassVar[Mapping[str, str]] = {"image_token_id": "image"}
    fact_count: ClassVar[int] = 2 + MOST_QUESTION_TOKENS
    videos: ClassVar[bool] = True
    reads_questions: ClassVar[bool] = True
    counted_question: ClassVar[int] = 32  # tokens of a question that the planner counts

    content_side: int = 1
    vocabulary: int = 30522  # of the Q-Former

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LlamaVid:
        vision, former = config.get("vision_config") or {}, config.get("qformer_config") or {}
        sizes = vision.get("image_size", 224), vision.get("patch_size", 14)
        return cls(*sizes, content_side=config.get("content_side", 1), vocabulary=former.get("vocab_size", FORMER_DEFAULTS["vocab_size"]))

    # ------------------------------------------------------------ an image

    @property
    def tokens(self) -> int:
        return 1 + self.content_side**2

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def unit(self) -> int:
        return self.side * self.side // self.tokens

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        return replace(super().view(width, height, pixels), facts=(1, 0) + MOST_QUESTION_TOKENS * (0,))

    def asked(self, facts: tuple[int, ...], question: Sequence[int]) -> tuple[int, ...]:
        ids = [*question] if len(question) <= MOST_QUESTION_TOKENS else [question[0], *question[1 - MOST_QUESTION_TOKENS :]]
        if ids and max(ids) >= self.vocabulary:
            raise InputError(
                f"the question has the token {max(ids)} and the Q-Former a vocabulary of {self.vocabulary}: put its own tokenizer in the"
                " folder `qformer_tokenizer` beside the run's, or raise `qformer_config.vocab_size`"
            )
        return (facts[0], len(ids), *ids, *(MOST_QUESTION_TOKENS - len(ids)) * [0])

    def question(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """What the first user turn says, between its header and the space behind it."""
        heads = [place for place, piece in enumerate(pieces) if piece[:2] == ("text", "USER: ")]
        ends = [place for place, piece in enumerate(pieces) if piece[:2] == ("text", "ASSISTANT:")]
        if not heads:
            return ()
        return pieces[heads[0] + 1 : next((end for end in ends if end > heads[0]), len(pieces)) - 1]

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return super().tower_pictures(facts) * int(facts[0])

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        return int(facts[0]), 1, self.tokens

    # ------------------------------------------------------------ videos

    def video_facts(self, view: View, frames: int) -> tuple[int, ...]:
        return (frames, *view.facts[1:])

    def video_pixels(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(frames)

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, family = config["vision_config"], cls.of(config)
        language = qwen_language(config, vocabulary, attention_biases=False)
        tower, width = tower_shape(vision, family), vision["hidden_size"]
        queries, former = config.get("num_query_tokens", 32), {**FORMER_DEFAULTS, **config["qformer_config"]}
        seen = reading(former, q_former(former, width, family.patches + 1, queries, width), queries, cls.counted_question)
        return ModelShape(
            replace(tower, other_parameters=tower.other_parameters - 2 * width),  # without the norm that the Q-Former reads through
            _per_token(seen, queries, family, width, language.width), language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from part_rules(config, ())
        yield from language_rules(config, trained_tokenizer)
        if (config.get("text_config") or {}).get("model_type", "llama") != "llama":
            yield ("text_config", "model_type"), "must be llama"
        vision, side = config.get("vision_config"), config.get("content_side", 1)
        if isinstance(vision, dict) and {"image_size", "patch_size"} <= vision.keys():
            across, rest = divmod(vision["image_size"], vision["patch_size"])
            if rest:
                yield ("vision_config", "image_size"), f"{vision['image_size']} is no multiple of patch_size {vision['patch_size']}"
            elif not isinstance(side, int) or side < 1 or across % side:
                yield ("content_side",), f"{side!r} does not divide the {across} patches of a side"

    @classmethod
    def resized(cls, config: Mapping[str, Any], side: int) -> dict[str, Any] | None:  # type: ignore[override]
        return None

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {name: value for name, value in super().preprocessor(pixels).items() if name != "processor_class"}

    def processor(self) -> dict[str, Any]:
        return {}


def _per_token(seen: ProjectorShape, queries: int, family: LlamaVid, vision: int, width: int) -> ProjectorShape:
    """The Q-Former, counted per query, with what makes tokens of a picture behind it, counted per visual token."""
    patches, content = family.patches, family.content_side**2
    parameters = seen.parameters + 2 * vision  # the norm in front
    parameters += vision * vision + vision + vision * width + width + vision * width + width + width * width + width
    # Keys of patches, scores, what queries find, its projection, and the MLP of the content.
    found = queries * patches * vision
    products = queries * seen.products + patches * vision * vision + 2 * found + vision * width + content * (vision * width + width * width)
    outer = queries * seen.outer + patches * vision * vision + found + content * vision * width
    kept = 3 * queries * seen.inner + patches * 2 * vision + queries * (vision + 2 * patches) + 2 * vision + content * (2 * width + vision)
    tokens = family.tokens
    return replace(seen, parameters=parameters, products=products // tokens, inner=kept // tokens // 3, outer=outer // tokens)


FAMILY = LlamaVid
