"""One token from a row of logits, at a uniform number that is given, with its log-probability."""

from __future__ import annotations

import torch

from terrace.generation.interface import Sampling
from terrace.objectives.grpo import token_logprobs


def sample_tokens(
    logits: torch.Tensor, draws: torch.Tensor, forbidden: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row and its log-probability. logits float32 [A, V], draws float64 [A] in [0, 1)."""
    logits = logits.index_fill(1, forbidden, float("-inf")) if len(forbidden) else logits
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=1)
        return tokens, token_logprobs(logits, tokens, sampling.scale)
    probabilities = torch.softmax(logits if sampling.scale == 1.0 else logits / sampling.scale, dim=1)
    offered = nucleus(probabilities.double(), sampling.top_p) if sampling.top_p < 1 else probabilities
    cumulative = offered.cumsum(dim=1, dtype=torch.float64)
    # Just below 1, so that rounding never points behind the last token that has any probability.
    wanted = draws * (1 - 1e-12) * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, wanted.unsqueeze(1), right=True)
    return tokens.squeeze(1), probabilities.gather(1, tokens).squeeze(1).log()


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities [A, V] with all but the smallest set of tokens that together reach `top_p` set to 0."""
    ordered, places = probabilities.sort(dim=1, descending=True)
    before = ordered.cumsum(dim=1) - ordered
    return torch.zeros_like(probabilities).scatter(1, places, ordered.where(before < top_p, torch.zeros_like(ordered)))
