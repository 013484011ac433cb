"""One decoding step with fewer operations, for language models whose layers are of the usual kind.

A step of a few rows is single operations, not arithmetic. transformers' layers are written for training: modules within modules,
normalisation in six operations, rotary tables anew for every token, keys and values turned to heads first. Here the same weights are
read where they lie (nothing is copied), with one operation for a normalisation, a table of rotations by position, and rows first.
Which layers are of the usual kind is a list of classes, so that nothing is taken for it by its looks; other models, layers that were
changed (LoRA) and positions that differ between axes take transformers' own way. Both agree within rounding.

Shape letters: R rows, H heads, K key-value heads, D head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from terrace.models.families.registry import family_of_model, output_layer
from terrace.models.head import LossHead

LAYERS = {
    "Qwen2VLDecoderLayer", "Qwen2_5_VLDecoderLayer", "Qwen3VLTextDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer",
    "LlamaDecoderLayer",
}  # fmt: skip
NORMS = {
    "Qwen2VLRMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm",
}  # fmt: skip
STEADY_ROTATIONS = {"default", "linear", "llama3", "yarn"}  # whose frequencies do not depend on the length
IDLE_HOOKS = "transformers.utils.output_capturing"  # it leaves hooks in every model that do nothing unless outputs are asked for
BLOCK = 1024  # positions that the table of rotations grows by: always the same numbers, however it grew


class RowsCache(Protocol):
    def attend_rows(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """query [R, H, D], key and value [R, K, D] of one new token per row -> [R, H, D]."""


class DecodeStep:
    """The step of a model for which `usual` holds."""

    def __init__(self, model: Any) -> None:
        self._language = family_of_model(model).language(model)
        self._head = output_layer(model)
        self._layers = list(self._language.layers)
        self._turned: list[tuple[torch.Tensor, torch.Tensor]] = []  # cosines and signed sines [BLOCK, 1, D] each
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def logits(self, tokens: torch.Tensor, positions: np.ndarray, cache: RowsCache) -> torch.Tensor:
        """float32 [R, V] after one more token of each row. tokens int64 [R]; positions int64 [R], on the host."""
        states = F.embedding(tokens, self._language.embed_tokens.weight)
        cosines, sines = self._rotations(positions, states)
        for number, layer in enumerate(self._layers):
            attention = layer.self_attn
            read = _normal(layer.input_layernorm, states)
            size = attention.head_dim
            query, key, value = (
                F.linear(read, module.weight, module.bias).view(len(read), -1, size)
                for module in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                query, key = _normal(attention.q_norm, query), _normal(attention.k_norm, key)
            query, key = _turned(query, cosines, sines).to(value.dtype), _turned(key, cosines, sines).to(value.dtype)
            window = getattr(attention, "sliding_window", None)
            seen = cache.attend_rows(number, query, key, value, attention.scaling, window)
            states = states + F.linear(seen.reshape(len(seen), -1), attention.o_proj.weight, attention.o_proj.bias)
            perceptron = layer.mlp
            read = _normal(layer.post_attention_layernorm, states)
            gate = perceptron.act_fn(F.linear(read, perceptron.gate_proj.weight))
            states = states + F.linear(gate.mul_(F.linear(read, perceptron.up_proj.weight)), perceptron.down_proj.weight)
        return self._head(_normal(self._language.norm, states)).float()

    def _rotations(self, positions: np.ndarray, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [R, 1, D] of these positions; the sines' first half negative, for `_turned`."""
        self._grow_table(int(positions.max()), states)
        assert self._table is not None
        places = torch.from_numpy(positions).to(states.device)
        return self._table[0][places], self._table[1][places]

    def _grow_table(self, last: int, states: torch.Tensor) -> None:
        """Until it holds this position, where and in the precision in which `states` are."""
        device = states.device
        if self._table is None or last >= len(self._table[0]):
            while last >= len(self._turned) * BLOCK:
                places = torch.arange(len(self._turned) * BLOCK, (len(self._turned) + 1) * BLOCK, device=device)
                cosines, sines = self._language.rotary_emb(states.new_zeros(1), places[None])
                half = sines.shape[-1] // 2
                sines = torch.cat([-sines[..., :half], sines[..., half:]], dim=-1)
                self._turned.append((cosines[0][:, None], sines[0][:, None]))
            self._table = tuple(torch.cat(parts) for parts in zip(*self._turned))  # type: ignore[assignment]


def usual(model: Any) -> bool:
    """Whether all of the model's language layers are of the usual kind and plain."""
    language = family_of_model(model).language(model)
    layers = getattr(language, "layers", None)
    rotation = getattr(language, "rotary_emb", None)
    kind = getattr(rotation, "rope_type", None)  # of some families a dict, with a kind for each type of layer
    if layers is None or not isinstance(kind, str) or kind not in STEADY_ROTATIONS:
        return False
    if type(getattr(language, "norm", None)).__name__ not in NORMS:  # some call theirs by another name
        return False
    return type(language.embed_tokens) is torch.nn.Embedding and all(
        type(layer).__name__ in LAYERS and _plain(layer) for layer in layers
    )


def rotated_axes(positions: np.ndarray) -> np.ndarray | None:
    """The place [R] that positions [P, R] rotate by, if it is the same on all axes, as a token of text has it. None otherwise."""
    axes = positions[1:] if len(positions) == 4 else positions  # of four, the first is the place in the text
    return axes[0] if bool((axes == axes[0]).all()) else None


def _plain(layer: Any) -> bool:
    """Nothing was put around or in the place of a layer's parts: no hooks, no adapters, no bias in the perceptron."""
    for module in layer.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(getattr(hook, "__module__", "") != IDLE_HOOKS for hook in hooks):
            return False
        kind = type(module)
        if isinstance(module, torch.nn.Linear) and kind not in (torch.nn.Linear, LossHead):
            return False
    perceptron = layer.mlp
    names = ("gate_proj", "up_proj", "down_proj")
    return all(type(getattr(perceptron, name, None)) is torch.nn.Linear and getattr(perceptron, name).bias is None for name in names)


def _normal(module: Any, states: torch.Tensor) -> torch.Tensor:
    if states.dtype == torch.float32:
        return F.rms_norm(states, module.weight.shape, module.weight, module.variance_epsilon)
    return module(states)


def _turned(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """[R, h, D] turned by [R, 1, D]: x cos + (-x2, x1) sin, where the signs are in the sines."""
    return torch.addcmul(states * cosines, states.roll(states.shape[-1] // 2, -1), sines)
