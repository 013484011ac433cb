"""Two towers of different origin: any tower of pictures that has a class token, and any encoder of text alone.

The text is read as that encoder's own family reads it, the picture as CLIP's; each tower's pooled vector goes through a linear map to the
common width. The poolers belong to the towers: one that comes from a checkpoint without a pooler begins a random one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from terrace.families.bert import Bert
from terrace.families.checks import complete
from terrace.families.clip import Clip
from terrace.families.interface import Bounds, Finding
from terrace.families.roberta import Roberta
from terrace.families.shapes import ModelShape
from terrace.families.text_encoder import TextEncoder, encoder_rules, encoder_shape
from terrace.families.two_towers import TOWER_FIELDS, towers_shape
from terrace.families.vit import Vit, picture_rules

TEXTS: Mapping[str, type[TextEncoder]] = {"bert": Bert, "roberta": Roberta}
PICTURES = ("vit", "clip_vision_model")


class _MarksOfText:
    """The marks of the text tower's own family; of the class those of BERT, which transformers takes where nothing is said."""

    def __get__(self, one: VisionTextDualEncoder | None, owner: type) -> Mapping[str, str]:
        return TEXTS["bert" if one is None else one.text].marks


@dataclass(frozen=True)
class VisionTextDualEncoder(Clip):
    """`VisionTextDualEncoderModel`. `text` and `picture` are the model types of its towers."""

    name: ClassVar[str] = "vision-text-dual-encoder"
    marks: ClassVar[Mapping[str, str]] = _MarksOfText()  # type: ignore[assignment]
    text_fields: ClassVar[Mapping[str, str]] = TextEncoder.text_fields
    token_names: ClassVar[Mapping[str, str]] = TextEncoder.token_names

    text: str = "bert"
    picture: str = "vit"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VisionTextDualEncoder:
        vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
        kind = str(text.get("model_type") or cls.text)
        return cls(
            int(vision.get("image_size") or cls.side), int(vision.get("patch_size") or cls.patch),
            TEXTS.get(kind, Bert).of(text).context, kind if kind in TEXTS else cls.text, str(vision.get("model_type") or cls.picture),
        )  # fmt: skip

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, text, common = config["vision_config"], config["text_config"], int(config.get("projection_dim", 512))
        width = int(vision["hidden_size"])
        if vision.get("model_type") == "clip_vision_model":
            tower = super().shape(config, vocabulary).vision
        else:
            tower = Vit.shape(vision).vision
            pooler = (width + 1) * int(vision.get("pooler_output_size") or width)
            tower = replace(tower, other_parameters=tower.other_parameters + pooler)
        maps = (width + int(text["hidden_size"])) * common
        return towers_shape(tower, encoder_shape(text, vocabulary, filled=False), maps + 1, maps)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        kinds = (("vision_config", PICTURES, cls.picture), ("text_config", TEXTS, cls.text))
        for name, known, usual in kinds:
            part = config.get(name)
            if not isinstance(part, dict):
                yield (), f"needs `{name}`, a map of shape fields"
            elif (kind := part.get("model_type", usual)) not in known:
                yield (name, "model_type"), f"{kind!r} is no tower that is known here; there are {', '.join(known)}"
        vision, text = config.get("vision_config"), config.get("text_config")
        if isinstance(vision, dict) and (yield from complete(vision, (*TOWER_FIELDS, "image_size", "patch_size"), ("vision_config",))):
            for path, problem in picture_rules(vision):
                yield ("vision_config", *path), problem
            if vision.get("attention_dropout"):
                yield ("vision_config", "attention_dropout"), "must be 0: a step runs the towers twice, and both passes must agree"
        if isinstance(text, dict):
            yield from encoder_rules(text, ("text_config",), trained_tokenizer)
        if not isinstance(config.get("projection_dim"), int):
            yield (), "needs `projection_dim`, the width that both towers are mapped to"

    @classmethod
    def completed(cls, config: Mapping[str, Any], token_id: Any, size: int) -> dict[str, Any]:
        text = dict(config.get("text_config") or {})
        own = TEXTS.get(str(text.get("model_type") or cls.text), Bert)
        return dict(config) | {"text_config": {"model_type": own.name} | own.completed(text, token_id, size)}

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return super().preprocessor(pixels) | {"processor_class": "VisionTextDualEncoderProcessor"}


FAMILY = VisionTextDualEncoder
