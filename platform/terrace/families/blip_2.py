"""BLIP-2 with a decoder (OPT): a tower with a class token, and a Q-Former that reads it into a fixed number of tokens.

The sample reads: images, the mark of the beginning, `Question: ... Answer:`, the answer. This is the second stage of the paper, where the
language model learns to read the Q-Former's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from terrace.families.checks import complete
from terrace.families.interface import Finding, Piece
from terrace.families.one_tile import OneTile
from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD
from terrace.families.shapes import LanguageShape, ModelShape, ProjectorShape, VisionShape, encoder_block
from terrace.families.tools import refuse_tools

OFFSET = 2  # rows of OPT's positions that no token takes


@dataclass(frozen=True)
class Blip2(OneTile):
    name: ClassVar[str] = "blip-2"
    marks: ClassVar[Mapping[str, str]] = {"end_of_turn": "</s>", "pad": "<pad>", "image": "<image>"}
    begin_of_text: ClassVar[str] = "end_of_turn"
    end_of_text: ClassVar[str] = "end_of_turn"
    never: ClassVar[tuple[str, ...]] = ("image", "pad")
    answer_prefix: ClassVar[str] = " "
    refused_objectives: ClassVar[Mapping[str, str]] = {
        "mtp": "its OPT decoder embeds positions itself, where a further block would see them twice; use medusa"
    }
    token_fields: ClassVar[Mapping[str, str]] = {"image_token_index": "image"}
    mean: ClassVar[tuple[float, ...]] = IMAGE_MEAN
    std: ClassVar[tuple[float, ...]] = IMAGE_STD
    image_processor: ClassVar[str] = "BlipImageProcessor"
    processor_class: ClassVar[str] = "Blip2Processor"
    chat_template: ClassVar[str] = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{% if message['content'] is string %}"
        "{{ '</s>' if loop.first else ' ' }}Question: {{ message['content'] }}{% else %}"
        "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>{% endif %}{% endfor %}"
        "{{ '</s>' if loop.first else ' ' }}Question: "
        "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %} Answer:"
        "{% else %} {{ message['content'] if message['content'] is string else message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    )

    queries: int = 32

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Blip2:
        vision = config.get("vision_config") or {}
        return cls(vision.get("image_size", 224), vision.get("patch_size", 14), config.get("num_query_tokens", 32))

    @property
    def tokens(self) -> int:
        return self.queries

    # ------------------------------------------------------------ text

    def plain_turns(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        messages = refuse_tools(messages, self.name)
        if [message["role"] for message in messages][:2] not in (["user"], ["user", "assistant"]) or len(messages) > 2:
            raise ValueError("BLIP-2's form is one question and its answer: no system turn and no second turn; split the conversation")
        return messages

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        if role == "assistant":
            yield "text", self.answer_prefix, supervised
            yield from content
            yield "mark", "end_of_turn", supervised
            return
        pieces = list(content)
        yield from (piece for piece in pieces if piece[0] == "image")
        yield "mark", "end_of_turn", False
        yield "text", "Question: ", False
        yield from (piece for piece in pieces if piece[0] != "image")
        yield "text", " Answer:", False
        yield "cut", None, False

    def running(self, content: Iterable[Piece]) -> Iterator[Piece]:
        pieces = list(content)
        images = next((place for place, piece in enumerate(pieces) if piece[0] != "image"), len(pieces))
        yield from pieces[:images]
        yield "mark", "end_of_turn", False
        yield from pieces[images:]

    def generation(self) -> Iterator[Piece]:
        return iter(())

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, text, former, family = config["vision_config"], config["text_config"], config["qformer_config"], cls.of(config)
        heads, hidden, width = text["num_attention_heads"], text["hidden_size"], vision["hidden_size"]
        language = LanguageShape(
            layers=text["num_hidden_layers"], width=text["hidden_size"], intermediate=text["ffn_dim"], heads=heads, key_heads=heads,
            head_size=text["hidden_size"] // heads, vocabulary=text.get("vocab_size") or vocabulary or 0,
            tied=bool(text.get("tie_word_embeddings", True)), attention_biases=False, gated=False,
            rotary=False, layer_biases=4 * hidden + text["ffn_dim"] + hidden + 2 * hidden,
            other_biases=hidden + (text["max_position_embeddings"] + OFFSET) * hidden,
        )  # fmt: skip
        return ModelShape(tower_shape(vision, family), q_former(former, width, family.patches + 1, family.tokens, language.width), language)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from part_rules(config, ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"))
        if isinstance(text := config.get("text_config"), dict):
            yield from _text_rules(text, trained_tokenizer)

    def processor(self) -> dict[str, Any]:
        return {"processor_class": self.processor_class, "num_query_tokens": self.tokens}


def part_rules(config: Mapping[str, Any], text: tuple[str, ...]) -> Iterator[Finding]:
    """Tower, Q-Former and language model are maps with what they need, and nothing drops numbers at random."""
    tower = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    parts = {"text_config": text, "vision_config": (*tower, "image_size", "patch_size"), "qformer_config": tower}
    for name, fields in parts.items():
        part = config.get(name)
        if not isinstance(part, dict):
            yield (), f"needs `{name}`, a map of shape fields"
        elif (yield from complete(part, fields, (name,))) and part["hidden_size"] % part["num_attention_heads"]:
            yield (name, "num_attention_heads"), f"{part['num_attention_heads']} heads do not divide {part['hidden_size']}"
    if isinstance(former := config.get("qformer_config"), dict):
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if former.get(field, 0.1):
                yield ("qformer_config", field), "must be 0: a dropout would make the loss depend on how samples are packed"


def _text_rules(text: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
    at = ("text_config",)
    if text.get("model_type", "opt") != "opt":
        yield (*at, "model_type"), f"{text['model_type']}: only decoders of kind opt are supported, no encoder-decoder"
    if not trained_tokenizer and not text.get("vocab_size"):
        yield at, "needs `vocab_size`"
    if text.get("dropout", 0.1):
        yield (*at, "dropout"), "must be 0: packed attention has no dropout"
    if text.get("word_embed_proj_dim", text.get("hidden_size")) != text.get("hidden_size"):
        yield (*at, "word_embed_proj_dim"), "must be hidden_size"
    if text.get("do_layer_norm_before", True) is not True:
        yield (*at, "do_layer_norm_before"), "must be true"


def tower_shape(vision: Mapping[str, Any], family: Blip2) -> VisionShape:
    """EVA's tower with a class token."""
    width, inner, depth, values = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"], 3 * family.patch**2
    return VisionShape(
        depth=depth, width=width, intermediate=inner, heads=vision["num_attention_heads"], gated=False, window=None,
        full_blocks=depth, patch_values=values, patches_per_token=family.patches / family.tokens,
        block_parameters=encoder_block(width, inner), extra_tokens=1, kept_inner=2,
        other_parameters=values * width + width + width + (family.patches + 1) * width + 2 * width,
    )  # fmt: skip


def q_former(former: Mapping[str, Any], seen_width: int, seen: int, queries: int, out: int) -> ProjectorShape:
    """The Q-Former over `seen` vectors of the tower and `queries` of its own, and the projection behind it."""
    width, inner, layers = former["hidden_size"], former["intermediate_size"], former["num_hidden_layers"]
    crossing = len(range(0, layers, former.get("cross_attention_frequency", 2)))
    feed = 2 * width * inner + inner + width + 2 * width
    own = 4 * (width * width + width) + 2 * width + feed
    cross = 2 * (width * width + width) + 2 * (seen_width * width + width) + 2 * width
    parameters = layers * own + crossing * cross + 2 * width + queries * width + width * out + out
    keys = round(crossing * 2 * seen_width * width * seen / queries)
    products = layers * (4 * width * width + 2 * width * queries + 2 * width * inner)
    products += crossing * (2 * width * width + 2 * width * seen) + keys + width * out
    kept = layers * (10 * width + 2 * inner) + crossing * (5 * width + round(2 * width * seen / queries))
    return ProjectorShape(parameters, products, kept // 3, outer=keys)


FAMILY = Blip2
