"""InstructBLIP with a decoder (Vicuna): BLIP-2 whose Q-Former reads the question together with the picture.

The sample reads: images, the mark of the beginning, the question, the answer. The Q-Former has a vocabulary of its own, and a tokenizer
where the folder of the run's has one in it (`qformer_tokenizer`, as published); else the run's tokenizer writes its questions too.
The question travels with each image as facts: how many tokens, and their ids. A caption asks nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from terrace.errors import InputError
from terrace.families.blip_2 import Blip2, part_rules, q_former, tower_shape
from terrace.families.checks import language_rules
from terrace.families.interface import Bounds, Finding, Piece, View
from terrace.families.qwen2_vl import qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape

MOST_QUESTION_TOKENS = 128  # that the Q-Former reads, as published: of a longer question the first 127 and its last
FORMER_DEFAULTS = {"max_position_embeddings": 512, "vocab_size": 30522}


@dataclass(frozen=True)
class InstructBlip(Blip2):
    """The facts of an image: 1 tile, the tokens of its question, and their ids with zeros behind them."""

    name: ClassVar[str] = "instructblip"
    marks: ClassVar[Mapping[str, str]] = {"end_of_turn": "</s>", "image": "<image>"}
    never: ClassVar[tuple[str, ...]] = ("image",)
    answer_prefix: ClassVar[str] = ""
    refused_objectives: ClassVar[Mapping[str, str]] = {}
    fact_count: ClassVar[int] = 2 + MOST_QUESTION_TOKENS
    reads_questions: ClassVar[bool] = True
    counted_question: ClassVar[int] = 32  # tokens of a question that the planner counts
    processor_class: ClassVar[str] = "InstructBlipProcessor"
    chat_template: ClassVar[str] = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{% if message['content'] is string %}"
        "{{ '</s>' + message['content'] }}{% else %}"
        "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>{% endif %}{% endfor %}</s>"
        "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% else %}{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    )

    vocabulary: int = 30522  # of the Q-Former

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> InstructBlip:
        base, former = super().of(config), config.get("qformer_config") or {}
        return replace(base, vocabulary=former.get("vocab_size", 30522))

    # ------------------------------------------------------------ an image

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        return replace(super().view(width, height, pixels), facts=(1, 0) + MOST_QUESTION_TOKENS * (0,))

    def asked(self, facts: tuple[int, ...], question: Sequence[int]) -> tuple[int, ...]:
        ids = [*question] if len(question) <= MOST_QUESTION_TOKENS else [*question[: MOST_QUESTION_TOKENS - 1], question[-1]]
        if ids and max(ids) >= self.vocabulary:
            raise InputError(
                f"the question has the token {max(ids)} and the Q-Former a vocabulary of {self.vocabulary}: put its own tokenizer in the"
                " folder `qformer_tokenizer` beside the run's, or raise `qformer_config.vocab_size`"
            )
        return (facts[0], len(ids), *ids, *(MOST_QUESTION_TOKENS - len(ids)) * [0])

    # ------------------------------------------------------------ text

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        if role == "assistant":
            yield from content
            yield "mark", "end_of_turn", supervised
            return
        pieces = list(content)
        yield from (piece for piece in pieces if piece[0] == "image")
        yield "mark", "end_of_turn", False
        yield from (piece for piece in pieces if piece[0] != "image")
        yield "cut", None, False

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, former, family = config["vision_config"], config["qformer_config"], cls.of(config)
        language = qwen_language(config, vocabulary, attention_biases=False)
        queries = q_former(former, vision["hidden_size"], family.patches + 1, family.tokens, language.width)
        asked = reading({**FORMER_DEFAULTS, **former}, queries, family.tokens, cls.counted_question)
        return ModelShape(tower_shape(vision, family), asked, language)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from part_rules(config, ())
        yield from language_rules(config, trained_tokenizer)
        if (config.get("text_config") or {}).get("model_type") != "llama":
            yield ("text_config", "model_type"), "must be llama: other decoders and encoder-decoders are not supported here"


def reading(former: Mapping[str, Any], pictures: ProjectorShape, queries: int, words: int) -> ProjectorShape:
    """A Q-Former that also reads a question of so many words, with embeddings, positions and a feed-forward of their own."""
    width, inner, layers = former["hidden_size"], former["intermediate_size"], former["num_hidden_layers"]
    feed = 2 * width * inner + inner + width + 2 * width
    share = words / queries
    # Every token of the question goes through self-attention and feed-forward, and meets the queries as they meet it.
    products = layers * (share * (4 * width * width + 2 * width * inner) + 2 * width * (words * (1 + share) + words))
    return replace(
        pictures, parameters=pictures.parameters + (former["vocab_size"] + former["max_position_embeddings"]) * width + layers * feed,
        products=pictures.products + round(products), inner=pictures.inner + round(share * layers * (10 * width + 2 * inner) / 3),
    )  # fmt: skip


FAMILY = InstructBlip
