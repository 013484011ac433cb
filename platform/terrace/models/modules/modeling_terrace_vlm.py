"""A tower, a connector and a language model as one transformers model. An export carries this file and those it imports."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel

from .configuration_terrace_vlm import TerraceVlmConfig
from .connectors import make_connector
from .eva_towers import as_eva, behind_eva
from .modality_adapters import KindVectors, ModalityAdapter, add_modality_adapters
from .q_former import QFormer
from .resampler import Resampler
from .sparse_mlp import SparseMlp
from .visual_expert import add_visual_experts
from .window_adapters import WindowLinear, add_window_adapters


class TerraceVlmPreTrainedModel(LlavaPreTrainedModel):
    config: TerraceVlmConfig
    config_class = TerraceVlmConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler | QFormer):
            init.trunc_normal_(module.query, std=0.02)
        elif isinstance(module, SparseMlp | WindowLinear | ModalityAdapter | KindVectors):
            module.reset_own_parameters()


class TerraceVlmModel(TerraceVlmPreTrainedModel, LlavaModel):
    def __init__(self, config: TerraceVlmConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        if config.vision_variant is not None:
            as_eva(self.vision_tower, config.vision_variant)
        vision_width, width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.multi_modal_projector = make_connector(config.connector, vision_width, width)
        self.language_model = AutoModel.from_config(config.text_config)
        if (sparse := config.experts) is not None:
            inner, capacity = config.text_config.intermediate_size, sparse["capacity_factor"]
            for number in sparse["layers"]:
                self.language_model.layers[number].mlp = SparseMlp(width, inner, sparse["count"], sparse["per_token"], capacity)
        if config.visual_expert:
            add_visual_experts(self.language_model)
        self.squares = None
        if config.window_adapters is not None:
            rows, columns = config.window_grid
            self.squares = add_window_adapters(self.vision_tower, rows * columns, **config.window_adapters)
        if config.modality_adapters is not None:
            add_modality_adapters(self.language_model, self.vision_tower, **config.modality_adapters)
        self.post_init()

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        asked = self.config.visual_expert or self.config.modality_adapters is not None
        if asked and input_ids is not None and bool((places := input_ids == self.config.image_token_id).any()):
            kwargs["image_places"] = places
        return super().forward(input_ids, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """[N, 3, S, S] -> `pooler_output`, N tensors [T, H]."""
        layer, vision, connector = self.config.vision_feature_layer, self.config.vision_config, self.config.connector
        class_tokens = connector["kind"] == "class_tokens"
        if self.squares is not None:
            self.squares.set(len(pixel_values), pixel_values.device)
        outputs = self.vision_tower(pixel_values, output_hidden_states=class_tokens or layer != -1, return_dict=True)
        across = vision.image_size // vision.patch_size
        if class_tokens:
            behind = outputs.hidden_states[connector["every"] :: connector["every"]]
            features = torch.stack([states[:, 0] for states in behind], dim=1)
        else:
            features = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
            features = behind_eva(self.vision_tower, self.config.vision_variant, features)
            features = features[:, features.shape[1] - across * across :]  # without a class token
        return BaseModelOutputWithPooling(pooler_output=list(self.multi_modal_projector(features, across, across)))


class TerraceVlmForConditionalGeneration(TerraceVlmPreTrainedModel, LlavaForConditionalGeneration):
    def __init__(self, config: TerraceVlmConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = TerraceVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


__all__ = ["TerraceVlmForConditionalGeneration", "TerraceVlmModel"]
