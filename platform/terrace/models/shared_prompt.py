"""A prompt computed once for all of its responses: attention with a shared prefix, for training and for decoding.

A *unit* is a prompt followed by G responses in one pack: `[prompt | response 1 | ... | response G]`. The prompt
attends to itself; each response attends to the prompt and to itself, never to another response. Positions of every
response go on from the prompt's end, so logits and gradients are those of G separate sequences, while a prompt of P
tokens (mostly image) costs P instead of G * P rows in every layer, and its images one pass through the vision tower.

The responses of a unit are filled up inside attention only, to the longest of those that are about as long: one call per unit where they
all are, exact on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from terrace.models.attention import give_language_attention, registered_name, use_attention, visible_within
from terrace.models.batch import DeviceBatch
from terrace.models.families.registry import family_of_model, output_layer
from terrace.models.forward import hidden_states

NAME = "terrace_flash_shared_prompt"  # "flash" as in models.attention: transformers then builds no mask


@dataclass(frozen=True)
class Unit:
    """Where a prompt and its responses lie in a pack: `[start, start + prompt)` and then each response's tokens."""

    start: int
    prompt: int
    responses: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.prompt + sum(self.responses)


class DecodeAttention(Protocol):
    """What a decoding cache answers for one new token of each of A sequences."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """query [1, H, A, D], key and value [1, K, A, D] -> [1, A, H, D]; no further back than `window` tokens."""


def use_shared_prompt_attention(model: Any, backend: str) -> None:
    """Give the language layers this attention; `backend` still serves vision and packs without units."""
    use_attention(model, backend)
    give_language_attention(model, NAME, backend)


def unit_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, units: list[Unit], scale: float, groups: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]. `groups` and `window` as in models.attention.visible_within."""
    outputs = []
    for unit in units:
        prompt = slice(unit.start, unit.start + unit.prompt)
        q, k, v = query[:, :, prompt], key[:, :, prompt], value[:, :, prompt]
        grouped = q.shape[1] != k.shape[1]
        seen = visible_within(unit.prompt, groups[prompt] if groups is not None else None, window, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=grouped)
        outputs.append(out[0].transpose(0, 1))
        if unit.responses and max(unit.responses):
            outputs.append(_responses(query, key, value, k, v, unit, scale, window))
    return torch.cat(outputs).unsqueeze(0)


def _responses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompt_key: torch.Tensor,
    prompt_value: torch.Tensor,
    unit: Unit,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Attention of all responses of a unit to the prompt and themselves: [sum of responses, H, D]."""
    own = [tensor[0, :, unit.start + unit.prompt : unit.end].transpose(0, 1) for tensor in (query, key, value)]  # [S, h, D] each
    lengths = np.asarray(unit.responses)
    if (lengths == lengths.max()).all():
        return _level(*own, prompt_key, prompt_value, len(lengths), scale, window)
    ends, parts, places = np.cumsum(lengths), [], []
    for numbers in _alike(lengths):
        within = np.arange(lengths[numbers].max())[None]
        real = within < lengths[numbers][:, None]
        taken = (ends - lengths)[numbers][:, None] + within  # a place without a row of its own gets the first: nothing real sees it
        padded = [_rows(tensor, torch.from_numpy(np.where(real, taken, 0).ravel()).to(tensor.device)) for tensor in own]
        out = _level(*padded, prompt_key, prompt_value, len(numbers), scale, window)
        parts.append(_rows(out, torch.from_numpy(np.flatnonzero(real)).to(out.device)))
        places.append(taken[real])
    back = np.argsort(np.concatenate(places))
    return _rows(torch.cat(parts), torch.from_numpy(back).to(query.device))


def _alike(lengths: np.ndarray) -> list[np.ndarray]:
    """Numbers of the responses, those of similar length together: each at least half as long as the longest of its group. What fills
    one up is computed too, and grows with the square of the length."""
    groups: list[list[int]] = []
    for number in np.argsort(-lengths, kind="stable").tolist():
        if lengths[number] and (not groups or 2 * lengths[number] < lengths[groups[-1][0]]):
            groups.append([])
        if lengths[number]:
            groups[-1].append(number)
    return [np.asarray(group) for group in groups]


def _level(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prompt_key: torch.Tensor, prompt_value: torch.Tensor, count: int,
    scale: float, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """`count` responses of one length N, tensors [count * N, h, D] each: [count * N, H, D]. What fills a response up stands behind all of
    its real tokens, so the causal mask alone hides it."""
    longest, prompt = len(query) // count, prompt_key.shape[2]
    q, own_key, own_value = (tensor.unflatten(0, (count, longest)).transpose(1, 2) for tensor in (query, key, value))
    k = torch.cat([prompt_key.expand(count, -1, -1, -1), own_key], dim=2)
    v = torch.cat([prompt_value.expand(count, -1, -1, -1), own_value], dim=2)
    rows = torch.arange(longest, device=q.device)
    visible = torch.ones(longest, prompt + longest, dtype=torch.bool, device=q.device)
    visible[:, prompt:] = rows[:, None] >= rows[None, :]
    if window is not None:
        places = torch.arange(prompt + longest, device=q.device)
        visible &= prompt + rows[:, None] - places[None] < window
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _rows(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """tensor[places] for [N, h, D]; an embedding, because its backward adds whole rows."""
    return F.embedding(places, tensor.flatten(1)).unflatten(1, tensor.shape[1:])


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    prompt_units: list[Unit] | None = None,
    decode: DecodeAttention | None = None,
    keep: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    bidirectional_groups: torch.Tensor | None = None,
    sliding_window: int | None = None,
    crossing: Any = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls. `keep` collects keys and values per layer (prefill); `decode` brings its own cache."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if value.dtype != query.dtype:  # rotary embedding in fp32 under autocast
        query, key = query.to(value.dtype), key.to(value.dtype)
    if crossing is not None:
        return crossing.attend(query, key, value, scale), None
    if decode is not None:
        return decode.attend(module.layer_idx, query, key, value, scale, sliding_window), None
    if keep is not None:
        keep[module.layer_idx] = (key, value)
    if prompt_units is not None:
        return unit_attention(query, key, value, prompt_units, scale, bidirectional_groups, sliding_window), None
    plain = ALL_ATTENTION_FUNCTIONS[registered_name(module.plain_backend)]
    rest |= {"bidirectional_groups": bidirectional_groups, "sliding_window": sliding_window}
    return plain(module, query, key, value, attention_mask, scaling=scale, **rest)


AttentionInterface.register(NAME, _attention)


def units_hidden(
    model: Any, batch: DeviceBatch, units: list[Unit], keep: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
) -> torch.Tensor:
    """Hidden states [T, hidden] of a pack of units after the final norm, prompts computed once."""
    return hidden_states(model, batch, prompt_units=units, keep=keep)


def decode_logits(model: Any, tokens: torch.Tensor, positions: torch.Tensor, cache: DecodeAttention) -> torch.Tensor:
    """Logits float32 [A, V] after one more token of each of A sequences. tokens int64 [A], positions int64 [P, A]."""
    family = family_of_model(model)
    embeddings = family.language(model).embed_tokens(tokens.unsqueeze(0))
    hidden = family.run_language(model, embeddings, positions.unsqueeze(1), {"decode": cache})
    return output_layer(model)(hidden).float()
