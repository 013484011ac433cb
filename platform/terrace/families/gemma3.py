"""Gemma 3: a SigLIP tower whose patches are averaged to a fixed number of tokens; an image's tokens see each other in both directions.

Most layers of the language model see a window only. Cropped views of long pictures (pan and scan) are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from terrace.families.checks import complete, language_rules
from terrace.families.interface import Finding, Piece
from terrace.families.one_tile import OneTile
from terrace.families.qwen2_vl import qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape
from terrace.families.siglip_tower import siglip_tower
from terrace.families.tools import refuse_tools


@dataclass(frozen=True)
class Gemma3(OneTile):
    name: ClassVar[str] = "gemma3"
    images_both_ways: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True
    marks: ClassVar[Mapping[str, str]] = {
        "start": "<bos>", "end_of_text": "<eos>", "start_of_turn": "<start_of_turn>", "end_of_turn": "<end_of_turn>",
        "image_start": "<start_of_image>", "image_end": "<end_of_image>", "image": "<image_soft_token>",
    }  # fmt: skip
    after: ClassVar[tuple[str, ...]] = ("image_end",)
    beginning: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    never: ClassVar[tuple[str, ...]] = ("image", "image_start", "image_end", "start", "start_of_turn")
    token_fields: ClassVar[Mapping[str, str]] = {
        "image_token_index": "image", "boi_token_index": "image_start", "eoi_token_index": "image_end"
    }  # fmt: skip
    token_names: ClassVar[Mapping[str, str]] = {"boi_token": "image_start", "eoi_token": "image_end", "image_token": "image"}
    bilinear: ClassVar[bool] = True
    image_processor: ClassVar[str] = "Gemma3ImageProcessor"
    processor_class: ClassVar[str] = "Gemma3Processor"
    chat_template: ClassVar[str] = (
        "<bos>{% for message in messages %}"
        "{% if not (message['role'] == 'user' and loop.index0 == 1 and messages[0]['role'] == 'system') %}<start_of_turn>"
        "{{ 'model' if message['role'] == 'assistant' else 'user' }}\n{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}<start_of_image>{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{% if message['role'] == 'system' %}\n\n{% else %}<end_of_turn>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )

    side: int = 896
    seen: int = 256  # tokens of an image

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Gemma3:
        vision = config.get("vision_config") or {}
        return cls(vision.get("image_size", 896), vision.get("patch_size", 14), config.get("mm_tokens_per_image", 256))

    @property
    def tokens(self) -> int:
        return self.seen

    # ------------------------------------------------------------ text

    def heading(self, number: int) -> Iterator[Piece]:
        yield "text", "\n\n", False
        yield "mark", "image_start", False

    def heading_tokens(self, number: int) -> int:
        return 3

    def ending(self) -> Iterator[Piece]:
        yield "mark", "image_end", False
        yield "text", "\n\n", False

    def plain_turns(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """There is no system turn: what it says opens the first turn of the user."""
        messages = refuse_tools(messages, self.name)
        if messages[0]["role"] != "system":
            return messages
        if len(messages) == 1 or messages[1]["role"] != "user":
            raise ValueError("Gemma's form writes a system turn into the user's turn behind it, and there is none")
        said, first = messages[0], messages[1]
        return [{**first, "content": [*said["content"], {"type": "text", "text": "\n\n"}, *first["content"]]}, *messages[2:]]

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        if role not in ("user", "assistant"):
            raise ValueError(f"Gemma's form has no turn of role {role!r}")
        yield "mark", "start_of_turn", False
        yield "text", "model\n" if role == "assistant" else "user\n", False
        if role == "assistant":
            yield "cut", None, False
        yield from content
        yield "mark", "end_of_turn", supervised
        yield "text", "\n", False

    def generation(self) -> Iterator[Piece]:
        yield "mark", "start_of_turn", False
        yield "text", "model\n", False

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, language = config["vision_config"], qwen_language(config, vocabulary, attention_biases=False, head_norms=True)
        language = dataclasses.replace(language, norms=4, masked=True, tied=bool(config.get("tie_word_embeddings", True)))
        width, family = vision["hidden_size"], cls.of(config)
        return ModelShape(
            siglip_tower(vision, patches_per_token=family.patches / family.tokens, post_norm=True),
            ProjectorShape(width * language.width + width, width * language.width, width), language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from gemma_rules(config, trained_tokenizer)
        vision, text = config.get("vision_config"), config.get("text_config")
        if isinstance(text, dict):
            yield from complete(text, ("head_dim", "sliding_window"), ("text_config",))
        if isinstance(vision, dict) and all(isinstance(vision.get(field), int) for field in ("image_size", "patch_size")):
            across, tokens = vision["image_size"] // vision["patch_size"], config.get("mm_tokens_per_image", 256)
            if int(tokens**0.5) ** 2 != tokens or across % int(tokens**0.5):
                yield ("mm_tokens_per_image",), f"{tokens} tokens are no square whose side divides {across} patches"


def gemma_rules(config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
    """What Gemma's and PaliGemma's configurations must say, and what the one forward pass here does not compute."""
    yield from language_rules(config, trained_tokenizer)
    if "tie_word_embeddings" not in config:
        yield (), "needs `tie_word_embeddings`: true in the published models"
    text, vision, at = config.get("text_config"), config.get("vision_config"), ("vision_config",)
    if isinstance(text, dict):
        for field in ("attn_logit_softcapping", "final_logit_softcapping"):
            if text.get(field) is not None:
                yield ("text_config", field), "logits that are capped are not supported; must be null"
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
        return
    if vision["image_size"] % vision["patch_size"]:
        yield (*at, "image_size"), f"{vision['image_size']} is no multiple of patch_size {vision['patch_size']}"
    if vision["hidden_size"] % vision["num_attention_heads"]:
        yield (*at, "num_attention_heads"), f"{vision['num_attention_heads']} heads do not divide {vision['hidden_size']}"
    if vision.get("vision_use_head") is not False:
        yield (*at, "vision_use_head"), "must be false: nothing takes what SigLIP's head gives"


FAMILY = Gemma3
