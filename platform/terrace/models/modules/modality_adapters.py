"""LaVIN's mixture-of-modality adapters: a bottleneck with two ways out in front of every attention, mixed by what kind a sample is.

A learned vector stands for each kind of sample, text alone or with pictures. It goes through the language model beside the tokens, which
never see it, and attends to itself alone; so it is the same in every sample of its kind, and is computed once. In each layer a router
reads it, and its softmax, softened by a temperature, mixes the two ways out. In the tower's blocks a picture's class token is read instead.
The ways out begin at zero, so the model begins as it was, and its own tensors keep their names.

Shape letters: B samples side by side, L their tokens, N pictures, P their tokens, W width, r width of the bottleneck.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

KINDS = 2  # of samples: text alone, with pictures; and ways out of a bottleneck


class ModalityAdapter(nn.Module):
    """x + sum over ways e of w_e (B_e (A x + a) + b_e); with `groups`, each share of the outputs reads its share of the bottleneck."""

    def __init__(self, width: int, rank: int, groups: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.down = nn.Linear(width, rank)
        self.up = nn.Parameter(torch.empty(KINDS, groups, width // groups, rank // groups))
        self.up_bias = nn.Parameter(torch.empty(KINDS, width))
        self.router = nn.Linear(width, KINDS)

    def reset_own_parameters(self) -> None:
        init.zeros_(self.up)
        init.zeros_(self.up_bias)

    def mixture(self, read: torch.Tensor) -> torch.Tensor:
        """[..., W] -> [..., 2], which sum to 1."""
        return (self.router(read).float() / self.temperature).softmax(dim=-1).to(read.dtype)

    def forward(self, features: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
        """[..., W] with the mixture of each vector, [..., 2]."""
        narrow = self.down(features).unflatten(-1, (self.up.shape[1], -1))  # [..., groups, r / groups]
        weighed = mixture[..., None, None] * narrow[..., None, :, :]
        out = torch.einsum("...egr,egor->...go", weighed, self.up.to(weighed.dtype)).flatten(-2)
        return features + out + mixture @ self.up_bias.to(mixture.dtype)


class KindVectors(nn.Module):
    """[2, W]: what stands for text alone and for samples with pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(KINDS, width))

    def reset_own_parameters(self) -> None:
        init.normal_(self.weight)

    def forward(self) -> torch.Tensor:
        return self.weight


class Kinds:
    """What the layers of one call are told: each token's kind [B, L] or [B, 1], None for text alone; the vectors in front of each layer."""

    def __init__(self) -> None:
        self.of_tokens: torch.Tensor | None = None
        self.of_rows: torch.Tensor | None = None  # of the samples whose beginning a cache holds
        self.before: dict[int, torch.Tensor] = {}


def add_modality_adapters(language_model: Any, tower: Any, rank: int, groups: int, temperature: float) -> None:
    """Give both their adapters. The language model's forward then takes `sample_kinds`, int64 [B, L], or `image_places`, bool [B, L],
    where every row is one sample; with a cache that holds the beginning of its rows neither is needed again."""
    for block in tower.encoder.layers:
        block.adapter = ModalityAdapter(block.self_attn.q_proj.in_features, rank, groups, temperature)
        block.layer_norm1.register_forward_hook(partial(_adapted_by_class_token, block.adapter))
    kinds, width = Kinds(), language_model.embed_tokens.embedding_dim
    language_model.adapter_kinds = KindVectors(width)
    language_model.register_forward_pre_hook(partial(_begin, kinds), with_kwargs=True)
    for number, layer in enumerate(language_model.layers):
        layer.adapter = ModalityAdapter(width, rank, groups, temperature)
        last = number + 1 == len(language_model.layers)
        layer.input_layernorm.register_forward_hook(partial(_adapted, layer, number, last, kinds))


def _adapted_by_class_token(adapter: ModalityAdapter, norm: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    return adapter(out, adapter.mixture(out[:, :1]))


def _begin(
    kinds: Kinds, language_model: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given, places, past = options.pop("sample_kinds", None), options.pop("image_places", None), options.get("past_key_values")
    if given is None and places is not None:
        given = places.any(dim=1, keepdim=True).long()
    if given is None and past is not None and past.get_seq_length():
        given = kinds.of_rows
    kinds.of_tokens, kinds.of_rows = given, None if given is None else given[:, -1:]
    kinds.before = {0: language_model.adapter_kinds()}
    return arguments, options


def _adapted(
    layer: Any, number: int, last: bool, kinds: Kinds, norm: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor
) -> torch.Tensor:
    """What attention reads; and the kinds' vectors behind this layer. A layer that is computed again finds what was in front of it."""
    before = kinds.before[number].to(out.dtype)
    read = norm.forward(before)  # not as a call, whose hook this is
    mixtures = layer.adapter.mixture(read)
    if not last:
        attention = layer.self_attn
        values = attention.v_proj(layer.adapter(read, mixtures)).unflatten(-1, (-1, attention.head_dim))  # all that it attends to is itself
        behind = before + attention.o_proj(values.repeat_interleave(attention.num_key_value_groups, dim=-2).flatten(-2))
        kinds.before[number + 1] = behind + layer.mlp(layer.post_attention_layernorm(behind))
    if kinds.of_tokens is None:
        return layer.adapter(out, mixtures[0])
    return layer.adapter(out, mixtures[kinds.of_tokens])
