"""Configuration of LLaMA-VID: EVA's tower, a Q-Former that reads the question, a language model."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.instructblip.configuration_instructblip import InstructBlipQFormerConfig, InstructBlipVisionConfig


@strict
class LlamaVidConfig(PreTrainedConfig):
    """A picture, or a frame of a video, is one context token and `content_side` x `content_side` content tokens."""

    model_type = "llama_vid"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=InstructBlipVisionConfig),
        "qformer_config": SubConfigSpec(config_class=InstructBlipQFormerConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    content_side: int = 1
    image_token_id: int = 0
    tie_word_embeddings: bool = False
