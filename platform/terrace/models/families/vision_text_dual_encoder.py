"""Two towers of different origin with torch. Padding is masked, because a text's tokens look both ways."""

from __future__ import annotations

import copy
import re
from typing import Any, ClassVar

import torch
from transformers import AutoModel

from terrace.families.text_encoder import DROPOUTS
from terrace.models.families.clip import ClipModel
from terrace.models.families.vit import layer_name

# Of an encoder of text by itself, with a head or without one.
TEXT = re.compile(
    r"(bert|roberta)\.|embeddings\.(word_embeddings|position_embeddings\.weight|token_type_embeddings|LayerNorm)|pooler\.|"
    r"encoder\.layer\.\d+\.(attention\.(self|output\.(dense|LayerNorm))|intermediate|output)\."
)
PARTS = ("vision_model.", "text_model.", "visual_projection.", "text_projection.", "logit_scale")
HEADS = ("cls.", "lm_head.", "decoder.")  # of a checkpoint, which are left behind


class VisionTextDualEncoderModel(ClipModel):
    embedding: ClassVar[str] = "text_model.embeddings.word_embeddings.weight"

    def __init__(self, family: Any) -> None:
        super().__init__(family)
        self.reads_vit = family.picture == "vit"
        self.blocks = {  # type: ignore[misc]
            "vision": "vision_model.layers" if self.reads_vit else "vision_model.encoder.layers", "language": "text_model.encoder.layer",
        }  # fmt: skip

    def skeleton(self, config: Any) -> Any:
        quiet = copy.deepcopy(config)
        for name in DROPOUTS:
            setattr(quiet.text_config, name, 0.0)
        return AutoModel.from_config(quiet, dtype=torch.float32)

    def canonical_name(self, name: str) -> str:
        name = name.replace("vision_model.vision_model.", "vision_model.")  # as CLIP's tower was published inside of it
        if name.startswith((*PARTS, *HEADS)):
            return name
        if TEXT.match(name):
            return "text_model." + re.sub(r"^(bert|roberta)\.", "", name)
        if self.reads_vit:
            return "vision_model." + layer_name(name.removeprefix("vit."))
        return super().canonical_name(name)

    def may_be_new(self, name: str) -> bool:
        return ".pooler." in name

    def text_vectors(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model.get_text_features(input_ids=ids, attention_mask=mask, return_dict=True).pooler_output


MODEL = VisionTextDualEncoderModel
