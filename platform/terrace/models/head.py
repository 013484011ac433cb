"""The output layer with the loss inside: cross-entropy over a few rows of logits at a time.

A pack of 32,768 tokens has 20 GB of float32 logits over a vocabulary of 151,680. Here only `chunk_tokens` rows exist
at once, and the gradients with respect to the hidden states and to the weight are formed in the same pass, because
afterwards the logits are gone. That costs no extra matrix product (three in all, as without chunks) and keeps two
gradients until backward instead of the logits. Softmax and loss are in float32, and so is the running gradient of the
weight.

The loss is computed by the layer itself (not beside it), so that ZeRO-3's hooks gather the weight when it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LossHead(nn.Linear):
    """transformers' `lm_head`, which with `targets` returns the summed cross-entropy instead of logits."""

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, chunk_tokens: int = 1024, z_loss: float = 0.0
    ) -> torch.Tensor:
        """hidden [N, H] -> logits [N, V]; with targets int64 [N] -> float32 scalar, the sum over N (with `z_loss` times log²Z)."""
        if targets is None:
            return super().forward(hidden)
        return summed_cross_entropy(hidden, self.weight, targets, chunk_tokens, z_loss, self.bias)


def install_loss_head(model: Any, name: str) -> None:
    """Give a transformers model the head above in place of the layer of this name; parameter, name and tying stay what they were."""
    old = model.get_submodule(name)
    with torch.device("meta"):
        head = LossHead(old.in_features, old.out_features, bias=old.bias is not None)
    head.weight, head.bias = old.weight, old.bias
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, head)


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_tokens: int, z_loss: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T + bias)[target] + z_loss * log²Z, where Z is the softmax' divisor: float32 scalar.
    hidden [N, H], weight [V, H], bias [V], targets [N]."""
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_tokens, compute, torch.is_grad_enabled(), z_loss, bias)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_tokens: int,
        compute: torch.dtype, with_gradients: bool, z_loss: float, bias: torch.Tensor | None,
    ) -> torch.Tensor:
        wants_hidden = with_gradients and ctx.needs_input_grad[0]
        wants_weight = with_gradients and ctx.needs_input_grad[1]
        wants_bias = with_gradients and ctx.needs_input_grad[7]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(compute)
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = hidden[start : start + chunk_tokens].to(compute)
                wanted = targets[start : start + chunk_tokens].unsqueeze(1)
                logits = (rows @ matrix.t()).float()
                if bias is not None:
                    logits += bias.float()
                normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
                total += (normaliser - logits.gather(1, wanted) + z_loss * normaliser**2).sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                slope = logits.sub_(normaliser).exp_()
                if z_loss:
                    slope.mul_(1 + 2 * z_loss * normaliser)
                slope.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
                if grad_bias is not None:
                    grad_bias += slope.sum(0)
                slope = slope.to(compute)
                if grad_hidden is not None:
                    grad_hidden[start : start + chunk_tokens] = (slope @ matrix).to(grad_hidden.dtype)
                if grad_weight is not None:
                    grad_weight += slope.t() @ rows
        ctx.save_for_backward(*(gradient for gradient in (grad_hidden, grad_weight, grad_bias) if gradient is not None))
        ctx.wants = (wants_hidden, wants_weight, wants_bias, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wants_hidden, wants_weight, wants_bias, weight_dtype = ctx.wants
        saved = list(ctx.saved_tensors)
        grad_hidden = saved.pop(0) if wants_hidden else None
        grad_weight = saved.pop(0) if wants_weight else None
        grad_bias = (saved.pop(0) * upstream).to(weight_dtype) if wants_bias else None
        if grad_hidden is not None:
            grad_hidden = grad_hidden * upstream.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, grad_bias
