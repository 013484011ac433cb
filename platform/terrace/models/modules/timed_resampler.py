"""Flamingo's resampler: frames of a video, each with the learned embedding of its time, are read together into one set of latents.

A picture is a video of one frame. A video of more frames than there are embeddings has them stretched over its length, as Flamingo does
with thirty frames. Videos of different lengths stand padded beside each other, and nobody reads their padding.

Shape letters: R frames of all, I pictures and videos, P vectors of a frame, W their width, n latents, T frames of the longest.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from .padded_pictures import padded


class TimedResampler(IdeficsPerceiverResampler):
    def __init__(self, frames: int, *options: Any) -> None:
        super().__init__(*options)
        self.times = nn.Parameter(torch.randn(frames, self.embed_dim))

    def forward(self, context: torch.Tensor, frames: Sequence[int] = ()) -> torch.Tensor:
        """[R, P, W] -> [I, n, W]; `frames` of each picture or video, one after another: by default one each."""
        counts = list(frames) or [1] * len(context)
        context = context + torch.cat([self._times(count) for count in counts])[:, None].to(context.dtype)
        context, seen = padded(context.flatten(0, 1), [(count, context.shape[1]) for count in counts])
        latents = self.latents.repeat(len(counts), 1, 1)
        if seen is not None:
            seen = nn.functional.pad(seen, (0, latents.shape[1]), value=True)
        for attention, feed_forward in self.blocks:
            latents = _attended(attention, context, latents, seen) + latents
            latents = feed_forward(latents) + latents
        return self.layer_norm(latents)

    def _times(self, frames: int) -> torch.Tensor:
        """[frames, W]"""
        if frames <= len(self.times):
            return self.times[:frames]
        return nn.functional.interpolate(self.times.T[None].float(), frames, mode="linear", align_corners=True)[0].T


def _attended(attention: Any, context: torch.Tensor, latents: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """What IdeficsPerceiverAttention gives, for keys that are `seen`, bool [I, T * P + n]."""
    context, latents = attention.context_layer_norm(context), attention.latents_layer_norm(latents)
    everything = torch.cat([context, latents], dim=-2)
    projected = (attention.q_proj(latents), attention.k_proj(everything), attention.v_proj(everything))
    q, k, v = (tensor.unflatten(-1, (attention.n_heads, -1)).transpose(1, 2) for tensor in projected)
    if attention.qk_layer_norms:
        q, k = attention.q_layer_norm(q), attention.k_layer_norm(k)
    scores = (q * attention.qk_scale) @ k.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
    return attention.output_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
