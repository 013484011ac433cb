"""PaliGemma: a SigLIP tower, one question and its answer; image and question see each other in both directions.

The sample reads: images, the mark of the beginning, the question, a line end, the answer. Positions count from 1. Captions are
answers to an empty question. Everything up to the first token that is learned is the question: what is learned is never seen
from the front.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.gemma3 import gemma_rules
from terrace.families.interface import Finding, Piece, Visual
from terrace.families.one_tile import OneTile
from terrace.families.qwen2_vl import qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape
from terrace.families.siglip_tower import siglip_tower
from terrace.families.tools import refuse_tools


@dataclass(frozen=True)
class PaliGemma(OneTile):
    name: ClassVar[str] = "paligemma"
    marks: ClassVar[Mapping[str, str]] = {"start": "<bos>", "end_of_turn": "<eos>", "image": "<image>"}
    begin_of_text: ClassVar[str] = "start"
    looks_ahead: ClassVar[bool] = True
    end_of_text: ClassVar[str] = "end_of_turn"
    never: ClassVar[tuple[str, ...]] = ("image", "start")
    token_fields: ClassVar[Mapping[str, str]] = {"image_token_index": "image"}
    processor_class: ClassVar[str] = "PaliGemmaProcessor"
    chat_template: ClassVar[str] = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{% if message['content'] is string %}<bos>{{ message['content'] }}{% else %}"
        "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>{% endif %}{% endfor %}<bos>"
        "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\\n' }}"
        "{% else %}{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}<eos>{% endif %}{% endfor %}"
    )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PaliGemma:
        vision = config.get("vision_config") or {}
        return cls(vision.get("image_size", 224), vision.get("patch_size", 14))

    # ------------------------------------------------------------ text

    def plain_turns(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        messages = refuse_tools(messages, self.name)
        if [message["role"] for message in messages] not in (["user"], ["user", "assistant"]):
            raise ValueError("PaliGemma's form is one question and its answer: no system turn and no second turn; split the conversation")
        return messages

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        if role == "assistant":
            yield "cut", None, False
            yield from content
            yield "mark", "end_of_turn", supervised
            return
        pieces = list(content)
        yield from (piece for piece in pieces if piece[0] == "image")
        yield "mark", "start", False
        yield from (piece for piece in pieces if piece[0] != "image")
        yield "text", "\n", False

    def running(self, content: Iterable[Piece]) -> Iterator[Piece]:
        pieces = list(content)
        images = next((place for place, piece in enumerate(pieces) if piece[0] != "image"), len(pieces))
        yield from pieces[:images]
        yield "mark", "start", False
        if images:
            yield "text", "\n", False
            yield "cut", None, False
        yield from pieces[images:]

    def generation(self) -> Iterator[Piece]:
        return iter(())

    def positions(self, length: int, visuals: Sequence[Visual]) -> np.ndarray:
        return np.arange(1, length + 1, dtype=np.int32)[None]

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, language = config["vision_config"], qwen_language(config, vocabulary, attention_biases=False)
        language = dataclasses.replace(language, masked=True, tied=bool(config.get("tie_word_embeddings", True)))
        size = vision["hidden_size"] * language.width
        return ModelShape(
            siglip_tower(vision, post_norm=True), ProjectorShape(size + language.width, size, 0), language
        )

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from gemma_rules(config, trained_tokenizer)
        text = config.get("text_config")
        if not isinstance(text, dict):
            return
        if text.get("model_type", "gemma") != "gemma":
            yield ("text_config", "model_type"), f"{text['model_type']}: only the first PaliGemma's language model, gemma, is supported"
        if text.get("hidden_size") not in (None, config.get("projection_dim", 2048)):
            yield ("projection_dim",), f"must be the language model's hidden_size {text['hidden_size']}"

    def processor(self) -> dict[str, Any]:
        return {"processor_class": self.processor_class, "image_seq_length": self.tokens}

    def preprocessor(self, pixels: tuple[int, int]) -> dict[str, Any]:
        return super().preprocessor(pixels) | {"image_seq_length": self.tokens}


FAMILY = PaliGemma
