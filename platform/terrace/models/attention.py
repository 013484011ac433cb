"""Attention over the segments of a pack: vision windows, vision images and language samples through one function.

transformers calls a registered attention function with the boundaries of the segments (`cu_seq_lens_q`). Here they select:

- `sdpa_segments`: PyTorch's scaled_dot_product_attention per segment. Exact: a packed sample gets bit for bit the
  numbers it gets alone. Neighbouring segments of equal length (vision windows) go in one call. Works everywhere,
  chosen on CPU, where a pack of 8,108 tokens in 29 segments takes 3.5 s per step against 10.4 s with a mask over the
  whole pack.
- `varlen`: `torch.nn.attention.varlen`, the FlashAttention-2 inside the PyTorch wheel, or FlashAttention-3 where its package
  is installed and the device is of its generation. CUDA, bf16 or fp16 only.
- `flash_attn`: the flash-attn package, when it is installed.
- `flex`: FlexAttention with a block mask made from the segment numbers. CUDA.

No mask over a whole pack is ever built. The registered names contain "flash" because that is how transformers 5
decides to hand the boundaries of all vision segments to one call instead of splitting them itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from terrace.errors import InputError
from terrace.families.configurations import language_config
from terrace.models.families.interface import configurations
from terrace.models.families.registry import family_of_model
from terrace.models.parts import mtp_models

log = logging.getLogger(__name__)

BACKENDS = ("varlen", "flash_attn", "sdpa_segments", "flex")


def registered_name(backend: str) -> str:
    """The name under which a backend is registered with transformers."""
    return f"terrace_flash_{backend}"


def choose_backend(wanted: str, device_type: str, precision: str) -> tuple[str, str]:
    """The backend to use and the reason. `wanted` is the recipe's `model.attention`. Raises InputError if it cannot run."""
    cuda = device_type == "cuda"
    half = precision in ("bf16", "fp16")
    if wanted == "auto":
        if cuda and half:
            return "varlen", f"CUDA with {precision}: FlashAttention of the PyTorch wheel"
        if cuda:
            return "sdpa_segments", "FlashAttention has no fp32: exact attention segment by segment"
        return "sdpa_segments", f"device {device_type}: exact attention segment by segment"
    if wanted in ("varlen", "flash_attn") and not (cuda and half):
        raise InputError(
            f"model.attention: {wanted} needs a CUDA device and bf16 or fp16, here {device_type} and {precision}"
        )
    if wanted == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise InputError("model.attention: flash_attn is not installed (pip install flash-attn), or choose varlen")
    if wanted == "flex" and not cuda:
        raise InputError("model.attention: flex needs a CUDA device; on CPU choose sdpa_segments")
    return wanted, "named by the recipe"


def activate_flash_attention_3() -> tuple[bool, str]:
    """Let PyTorch's FlashAttention calls (`varlen` among them) run the third version where it can be; and the reason.

    It needs a device of compute capability 9.0 (H100, H200, H20) and the package `flash_attn_interface`; elsewhere the second
    version, which is in the wheel, goes on serving.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False, "FlashAttention-2 of the wheel: version 3 is for compute capability 9.0"
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False, "FlashAttention-2 of the wheel: the package flash_attn_interface of version 3 is not installed"
    from torch.nn.attention import activate_flash_attention_impl

    try:
        activate_flash_attention_impl("FA3")
    except (RuntimeError, ImportError, OSError) as error:
        return False, f"FlashAttention-2 of the wheel: version 3 could not be activated ({error})"
    return True, "FlashAttention-3"


def restore_flash_attention_2() -> None:
    """Undo `activate_flash_attention_3`."""
    from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl

    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def use_attention(model: Any, implementation: str) -> None:
    """Set the attention of a model and its parts: one of BACKENDS, or a name of transformers' own (`sdpa`, `eager`).

    A model whose samples stand side by side has no segments: it runs PyTorch's own attention whatever backend is named."""
    if not family_of_model(model).segmented:
        for part in configurations(model.config):
            part._attn_implementation = "sdpa" if implementation in BACKENDS else implementation
        return
    name = registered_name(implementation) if implementation in BACKENDS else implementation
    model.config._attn_implementation = name  # this sets every part, so it comes first
    for part in model.config.sub_configs:  # connectors of transformers' own, too
        getattr(model.config, part)._attn_implementation = name if implementation not in BACKENDS else "sdpa"
    if language_config(model.config) is not model.config:
        language_config(model.config)._attn_implementation = name
    for block in mtp_models(model):
        block.config._attn_implementation = name
    # A name that transformers has no mask function for gets no mask, silently: only towers without masks take ours.
    segments = family_of_model(model).tower_attention == "segments"
    if hasattr(model.config, "vision_config"):
        model.config.vision_config._attn_implementation = name if segments or implementation not in BACKENDS else "sdpa"


def give_language_attention(model: Any, name: str, plain_backend: str) -> None:
    """Give the language layers an attention of ours that falls back on `plain_backend` where it has nothing to do."""
    text = language_config(model.config)
    parts = {part: getattr(text, part)._attn_implementation for part in text.sub_configs}  # setting a whole one sets them, too
    text._attn_implementation = name
    for part, before in parts.items():
        getattr(text, part)._attn_implementation = before
    for block in mtp_models(model):
        block.config._attn_implementation = name
    for layer in [*family_of_model(model).blocks_of(model, "language"), *(block.layers[0] for block in mtp_models(model))]:
        layer.self_attn.plain_backend = plain_backend


@contextlib.contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """Run a block with another attention, for example `sdpa` around `model.generate`, which has no segments."""
    before = model.config._attn_implementation
    use_attention(model, implementation)
    try:
        yield
    finally:
        use_attention(model, before.removeprefix("terrace_flash_"))


def runs_of_equal_length(boundaries: list[int]) -> list[tuple[int, int, int]]:
    """(start, length, count) of each run of neighbouring segments with one length. `boundaries` starts with 0."""
    runs: list[tuple[int, int, int]] = []
    for start, end in itertools.pairwise(boundaries):
        length = end - start
        if length == 0:
            continue
        if runs and runs[-1][1] == length:
            first, _, count = runs[-1]
            runs[-1] = (first, length, count + 1)
        else:
            runs.append((start, length, 1))
    return runs


def visible_within(length: int, groups: torch.Tensor | None, window: int | None, device: torch.device) -> torch.Tensor | None:
    """bool [length, length]: what each token of a causal segment sees; None where that is everything before it.

    Tokens of one group (`groups` int64 [length], from 0 on) see each other, too; nobody sees further back than `window` tokens.
    """
    if groups is None and (window is None or length <= window):
        return None
    places = torch.arange(length, device=device)
    seen = places[:, None] >= places[None]
    if groups is not None:
        seen = seen | ((groups[:, None] == groups[None]) & (groups[:, None] >= 0))
    if window is not None:
        seen = seen & (places[:, None] - places[None] < window)
    return seen


def masked_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: list[int], scale: float, groups: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """`sdpa_segments` of causal segments with groups or a window, one after another: a mask is as large as one segment."""
    outputs = []
    for start, end in itertools.pairwise(boundaries):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        seen = visible_within(end - start, groups[start:end] if groups is not None else None, window, query.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs).unsqueeze(0)


def sdpa_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: list[int], causal: bool, scale: float
) -> torch.Tensor:
    """Exact attention inside each segment. query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D]."""
    heads, dimension = query.shape[1], value.shape[3]  # values may be narrower than queries and keys
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        value = value.repeat_interleave(heads // value.shape[1], dim=1)
    runs = runs_of_equal_length(boundaries)
    sizes = [length * count for _, length, count in runs]  # cut once: the backward of a cut joins, that of slices adds up whole tensors
    outputs = []
    for (_, length, count), *cut in zip(runs, *(tensor[0].split(sizes, dim=1) for tensor in (query, key, value)), strict=True):
        q, k, v = (tensor.unflatten(1, (count, length)).transpose(0, 1) for tensor in cut)  # [count, H, length, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(count * length, heads, dimension))
    return torch.cat(outputs).unsqueeze(0)


def varlen_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, causal: bool,
    scale: float,
) -> torch.Tensor:
    """FlashAttention over all segments at once. query [T, H, D], key and value [T, K, D]; returns [T, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    # Before 2.13 the flag does not exist and the kernel takes fewer key/value heads without it.
    grouped = {"enable_gqa": True} if key.shape[1] != query.shape[1] and "enable_gqa" in _parameters(varlen_attn) else {}
    return varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale,
        window_size=(-1, 0) if causal else (-1, -1), **grouped,
    )


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def flash_attn_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, causal: bool,
    scale: float,
) -> torch.Tensor:
    """The same through the flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=causal
    )


def flex_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, causal: bool,
    scale: float,
) -> torch.Tensor:
    """The same through FlexAttention; the block mask skips blocks outside the segments."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = query.shape[0]
    segment = torch.bucketize(torch.arange(tokens, device=query.device), cu_seqlens[1:].long(), right=True)

    def visible(_batch: Any, _head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        same = segment[q] == segment[k]
        return same & (q >= k) if causal else same

    mask = create_block_mask(visible, None, None, tokens, tokens, device=query.device)
    out = _compiled_flex()(
        query.transpose(0, 1).unsqueeze(0), key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0),
        block_mask=mask, scale=scale, enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


_COMPILED: dict[str, Callable[..., torch.Tensor]] = {}


def _compiled_flex() -> Callable[..., torch.Tensor]:
    if "flex" not in _COMPILED:
        from torch.nn.attention.flex_attention import flex_attention

        _COMPILED["flex"] = torch.compile(flex_attention, dynamic=True)
    return _COMPILED["flex"]


def _attention_function(backend: str) -> Callable[..., tuple[torch.Tensor, None]]:
    """The function that transformers calls; q [1, H, T, D], k and v [1, K, T, D] -> ([1, T, H, D], None)."""

    def segment_attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
        cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None, is_causal: bool | None = None,
        segment_boundaries: list[int] | None = None, bidirectional_groups: torch.Tensor | None = None,
        sliding_window: int | None = None, softcap: float | None = None, crossing: Any = None, **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if crossing is not None:  # a layer between those of the language model, which reads pictures
            return crossing.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
        if attention_mask is not None or dropout or softcap is not None:
            raise InputError("segment attention takes no mask, no dropout and no cap; set attention_dropout to 0")
        if cu_seq_lens_q is None:
            raise InputError(
                f"attention {backend!r} was called without segment boundaries: run the model through "
                "terrace.models.forward, or switch to sdpa with terrace.models.attention.attention(model, 'sdpa')"
            )
        causal = module.is_causal if is_causal is None else is_causal
        causal = causal or bidirectional_groups is not None  # a class that calls itself bidirectional means those
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if causal and (bidirectional_groups is not None or (sliding_window is not None and max_length_q and max_length_q > sliding_window)):
            boundaries = segment_boundaries if segment_boundaries is not None else cu_seq_lens_q.tolist()
            return masked_segments(query, key, value, boundaries, scale, bidirectional_groups, sliding_window), None
        if backend == "sdpa_segments":
            boundaries = segment_boundaries if causal and segment_boundaries is not None else cu_seq_lens_q.tolist()
            return sdpa_segments(query, key, value, boundaries, causal, scale), None
        kernel = {"varlen": varlen_segments, "flash_attn": flash_attn_segments, "flex": flex_segments}[backend]
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        if v.dtype != q.dtype:  # rotary embedding in fp32 under autocast
            q, k = q.to(v.dtype), k.to(v.dtype)
        width = v.shape[-1]
        if width != q.shape[-1]:  # the kernels know one width
            v = F.pad(v, (0, q.shape[-1] - width))
        longest = int(max_length_q) if max_length_q is not None else int((cu_seq_lens_q.diff()).max())
        return kernel(q, k, v, cu_seq_lens_q.to(torch.int32), longest, causal, scale)[..., :width].unsqueeze(0), None

    return segment_attention


for _backend in BACKENDS:
    AttentionInterface.register(registered_name(_backend), _attention_function(_backend))
