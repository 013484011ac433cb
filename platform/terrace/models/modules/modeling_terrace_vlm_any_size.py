"""A tower that sees pictures of any size, a connector and a language model. An export carries this file and those it imports.

`pixel_values` [1, 3, S, S * R]: the R patches of all pictures side by side; `target_sizes` [N, 2]: rows and columns of each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from .configuration_terrace_vlm_any_size import TerraceVlmAnySizeConfig
from .eva_towers import behind_eva
from .modeling_terrace_vlm import TerraceVlmForConditionalGeneration, TerraceVlmModel
from .padded_pictures import padded
from .sliced_towers import give_slices


class TerraceVlmAnySizeModel(TerraceVlmModel):
    config: TerraceVlmAnySizeConfig
    config_class = TerraceVlmAnySizeConfig

    def __init__(self, config: TerraceVlmAnySizeConfig) -> None:
        super().__init__(config)
        self.sized = [give_slices(self.vision_tower, (config.pictures or {}).get("positions") == "bucketed")]  # no module twice
        self.post_init()

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        pixels, sizes = kwargs.pop("pixel_values", None), kwargs.pop("target_sizes", None)
        if pixels is not None:
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(pixels, sizes)}
        return super().forward(input_ids, **kwargs)

    def get_image_features(
        self, pixel_values: torch.Tensor, target_sizes: torch.Tensor | Sequence[Sequence[int]] = (), **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """-> `pooler_output`, N tensors [T, H]: one pass of the tower and one of the connector, however many pictures there are."""
        layer, size = self.config.vision_feature_layer, self.config.vision_config.patch_size
        sizes = [(int(rows), int(columns)) for rows, columns in (torch.as_tensor(target_sizes).tolist())]
        patches = pixel_values.reshape(3, size, -1, size).permute(2, 0, 1, 3)
        pictures, seen = padded(patches, sizes)
        tower, (embeddings,) = self.vision_tower, self.sized
        embeddings.sizes = sizes
        length = pictures.shape[1] + embeddings.num_positions - embeddings.num_patches  # with a class token
        mask = None
        if seen is not None:
            like = pictures.new_empty(()).expand(len(sizes), length, 1)
            everything = nn.functional.pad(seen, (length - seen.shape[1], 0), value=True)
            mask = create_bidirectional_mask(tower.config, like, everything)
        outputs = tower(pictures, attention_mask=mask, output_hidden_states=layer != -1, return_dict=True)
        features = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
        features = behind_eva(tower, self.config.vision_variant, features)
        features = features[:, length - pictures.shape[1] :]
        if self.config.connector["kind"] == "resampler":
            tokens = list(self.multi_modal_projector(features, 0, 0, sizes, seen))
        else:  # by patch
            tokens = [given[: rows * columns] for given, (rows, columns) in zip(self.multi_modal_projector(features, 0, 0), sizes)]
        return BaseModelOutputWithPooling(pooler_output=tokens)


class TerraceVlmAnySizeForConditionalGeneration(TerraceVlmForConditionalGeneration):
    config: TerraceVlmAnySizeConfig
    config_class = TerraceVlmAnySizeConfig

    def __init__(self, config: TerraceVlmAnySizeConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = TerraceVlmAnySizeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.skipped: torch.Tensor | None = None  # positions that pictures of the last prompts left out, [B, 1]
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None, target_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None, labels: torch.Tensor | None = None, logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        if (self.config.pictures or {}).get("text_positions") == "one" and input_ids is not None:
            position_ids = self._positions(input_ids, position_ids, past_key_values)
        return super().forward(
            input_ids=input_ids, pixel_values=pixel_values, target_sizes=target_sizes, attention_mask=attention_mask,
            position_ids=position_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels,
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip

    def _positions(self, input_ids: torch.Tensor, given: torch.Tensor | None, cache: Any) -> torch.Tensor:
        """[B, L]: every token but the further ones of a picture, which share the position of its first, counts one."""
        before = cache.get_seq_length() if cache is not None else 0
        if given is None:
            given = torch.arange(before, before + input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
        if before and self.skipped is not None:
            return given - self.skipped
        picture = input_ids == self.config.image_token_id
        further = nn.functional.pad(picture[:, 1:] & picture[:, :-1], (1, 0))
        left_out = further.long().cumsum(1)
        self.skipped = left_out[:, -1:]
        return given - left_out


__all__ = ["TerraceVlmAnySizeForConditionalGeneration", "TerraceVlmAnySizeModel"]
