"""A mixture of experts in place of a dense feed-forward: each token goes to the `per_token` experts that its router prefers.

What comes out is the sum of their answers, weighted by the router's probabilities renormalised over the chosen, so a mixture of
equal copies computes what the dense layer did. With `capacity_factor`, and while gradients are recorded, an expert takes at most
capacity_factor * per_token * tokens / experts tokens of a call: first choices before second ones, in the order of tokens; the
weights of a token are renormalised over the experts that take it, and one that none takes passes by (`dropped` counts the
assignments). Without gradient, in evaluations and answers, nothing is dropped.

Letters: T tokens, E experts, k experts of a token, H width, I width inside an expert.
"""

import math

import torch
from torch import nn
from transformers import initialization as init


class SparseMlp(nn.Module):
    """[..., H] -> [..., H]. Each expert is down(silu(gate(x)) * up(x)); its matrices are slices of two tensors."""

    def __init__(self, width: int, inner: int, experts: int, per_token: int, capacity_factor: float | None = None) -> None:
        super().__init__()
        self.per_token, self.capacity_factor = per_token, capacity_factor
        self.gate = nn.Linear(width, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.dropped: torch.Tensor | None = None  # assignments left out by the last call with gradients

    def reset_own_parameters(self) -> None:
        """Random matrices. The class of the language model around it knows nothing of them."""
        init.normal_(self.gate_up_proj, std=0.02)
        init.normal_(self.down_proj, std=0.02)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        probabilities = self.gate(tokens).float().softmax(dim=-1)  # [T, E]
        weights, chosen = probabilities.topk(self.per_token, dim=-1)  # [T, k]
        kept = self._kept(chosen)
        weights = weights if kept is None else weights * kept
        weights = (weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)).to(tokens.dtype)
        chosen = chosen if kept is None else chosen.masked_fill(~kept, self.gate.out_features)  # nobody's number
        return self.answers(tokens, chosen, weights).view_as(hidden)

    def answers(self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[T, H], from tokens [T, H], the experts they go to and the weights of these, [T, k] both. Experts may lie on other ranks."""
        out = torch.zeros_like(tokens)
        for number in range(len(self.gate_up_proj)):
            rows, places = torch.nonzero(chosen == number, as_tuple=True)
            gate, up = nn.functional.linear(tokens[rows], self.gate_up_proj[number]).chunk(2, dim=-1)
            answer = nn.functional.linear(nn.functional.silu(gate) * up, self.down_proj[number])
            out = out.index_add(0, rows, (answer * weights[rows, places, None]).to(out.dtype))
        return out

    def _kept(self, chosen: torch.Tensor) -> torch.Tensor | None:
        """bool [T, k]: assignments within the experts' capacity; None: all."""
        if self.capacity_factor is None or not torch.is_grad_enabled():
            return None
        count, experts = chosen.numel(), self.gate.out_features
        capacity = math.ceil(self.capacity_factor * count / experts)
        in_order = nn.functional.one_hot(chosen.t().reshape(-1), experts)  # first choices of all tokens, then second ones
        place = (in_order.cumsum(dim=0) * in_order).sum(dim=1)  # from 1
        kept = (place <= capacity).view(self.per_token, -1).t()
        self.dropped = (~kept).sum()
        return kept
