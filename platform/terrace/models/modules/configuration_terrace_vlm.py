"""Configuration of a vision-language model made of a tower, a connector and a language model of different origin."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class TerraceVlmConfig(PreTrainedConfig):
    """`connector` says what stands between tower and language model; `image_layout` how pictures become the tower's squares."""

    model_type = "terrace_vlm"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    connector: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None  # count, per_token, capacity_factor, auxiliary_loss, layers: of an upcycled language model
    vision_variant: str | None = None  # `eva_clip_g` or `eva2_clip_e`: what a tower in CLIP's layout has otherwise
    visual_expert: bool = False  # own matrices for image tokens in every layer of the language model
    modality_adapters: dict[str, Any] | None = None  # rank, groups, temperature: of LaVIN's adapters in tower and language model
    window_adapters: dict[str, Any] | None = None  # attention_rank, mlp_rank: of Monkey's adapters for each window
    window_grid: list[int] | None = None  # rows and columns of windows of a picture, for the image_layout `windows`
    image_layout: str = "square"
    image_token_id: int = 0
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    tie_word_embeddings: bool = False
