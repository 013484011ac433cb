"""LLaMA-VID as one transformers model. An export carries this file and those it imports."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.instructblip.modeling_instructblip import InstructBlipVisionModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel

from .configuration_llama_vid import LlamaVidConfig
from .context_tokens import ContextContent


class LlamaVidPreTrainedModel(LlavaPreTrainedModel):
    config: LlamaVidConfig
    config_class = LlamaVidConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ContextContent):
            init.normal_(module.query, std=0.02)


class LlamaVidModel(LlamaVidPreTrainedModel, LlavaModel):
    def __init__(self, config: LlamaVidConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = InstructBlipVisionModel(config.vision_config)
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        self.multi_modal_projector = ContextContent(config.qformer_config, config.num_query_tokens, config.content_side, *widths)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None, qformer_attention_mask: torch.Tensor | None = None, **kwargs: Any,
    ) -> Any:
        if pixel_values is not None:
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(pixel_values, qformer_input_ids, qformer_attention_mask)}
        return super().forward(input_ids, **kwargs)

    def get_image_features(
        self, pixel_values: torch.Tensor, qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """[N, 3, S, S], pictures or frames, with the question that each is read for: [N, T], or [1, T] for all of them; absent: none is
        asked. -> `pooler_output`, N tensors [tokens, H]."""
        count = len(pixel_values)
        if qformer_input_ids is None:
            qformer_input_ids = torch.zeros(count, 1, dtype=torch.long, device=pixel_values.device)
            qformer_attention_mask = torch.zeros_like(qformer_input_ids)
        read = torch.ones_like(qformer_input_ids) if qformer_attention_mask is None else qformer_attention_mask
        question, read = (one.expand(count, -1) for one in (qformer_input_ids, read))
        tower = self.vision_tower  # its parts, since both what comes in front of its last norm and what behind is read
        hidden = tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state
        tokens = self.multi_modal_projector(hidden, tower.post_layernorm(hidden), question, read)
        return BaseModelOutputWithPooling(pooler_output=list(tokens))


class LlamaVidForConditionalGeneration(LlamaVidPreTrainedModel, LlavaForConditionalGeneration):
    def __init__(self, config: LlamaVidConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlamaVidModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None, qformer_attention_mask: torch.Tensor | None = None, **kwargs: Any,
    ) -> Any:
        questions = {"qformer_input_ids": qformer_input_ids, "qformer_attention_mask": qformer_attention_mask}
        asked = {name: value for name, value in questions.items() if value is not None}
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, **asked, **kwargs)


__all__ = ["LlamaVidForConditionalGeneration", "LlamaVidModel"]
