"""EVA's towers in CLIP's layout: `eva_clip_g` (BLIP-2, XComposer) and `eva2_clip_e` (CogVLM).

Both embed patches with a bias and have no norm in front of their blocks. In EVA-CLIP-g keys have no bias, and the norm behind the tower is
for every patch. In EVA2-CLIP-E a norm stands behind attention and behind the feed-forward, before what each gives is added; none
stands behind the tower.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


class NormsBehindLayer(CLIPEncoderLayer):
    """x + norm(attention(x)), then x + norm(feed-forward(x))."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + self.layer_norm1(attended)
        return hidden_states + self.layer_norm2(self.mlp(hidden_states))


def as_eva(tower: Any, variant: str) -> None:
    """Make a CLIP tower the `variant`, before its weights are there."""
    conv = tower.embeddings.patch_embedding
    tower.embeddings.patch_embedding = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
    tower.pre_layrnorm = nn.Identity()
    if variant == "eva2_clip_e":
        tower.encoder.layers = nn.ModuleList(NormsBehindLayer(tower.config) for _ in tower.encoder.layers)
        tower.post_layernorm = nn.Identity()
        return
    for layer in tower.encoder.layers:
        layer.self_attn.k_proj = nn.Linear(layer.self_attn.k_proj.in_features, layer.self_attn.k_proj.out_features, bias=False)


def behind_eva(tower: Any, variant: str | None, features: torch.Tensor) -> torch.Tensor:
    """What the tower gives, [N, T, W] of its last block, as its published class gives it."""
    return tower.post_layernorm(features) if variant == "eva_clip_g" else features
