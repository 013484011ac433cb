"""The losses of dpo, mpo, kto, orpo and simpo: pure functions of the log-probabilities of answers, float32, one value per pair or answer.

Letters: N pairs (or answers, of kto). `chosen` and `rejected` are sums of token log-probabilities over an answer with its end mark;
`*_ratio` is that sum less the reference's; `*_mean` is the sum divided by the answer's tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def smoothed_log_sigmoid(logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x): cross-entropy with a share e of labels the wrong way round."""
    loss = -F.logsigmoid(logits) * (1 - label_smoothing)
    return loss - F.logsigmoid(-logits) * label_smoothing if label_smoothing else loss


def dpo_losses(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log sigmoid(beta (chosen_ratio - rejected_ratio)), smoothed."""
    return smoothed_log_sigmoid(beta * (chosen_ratio - rejected_ratio), label_smoothing)


def robust_losses(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """The loss whose mean under labels flipped with probability e is that of dpo under the true ones."""
    logits = beta * (chosen_ratio - rejected_ratio)
    clean, flipped = -(1 - label_smoothing) * F.logsigmoid(logits), -label_smoothing * F.logsigmoid(-logits)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def ipo_losses(chosen_ratio_mean: torch.Tensor, rejected_ratio_mean: torch.Tensor, beta: float) -> torch.Tensor:
    """(margin - 1 / (2 beta))^2, where the margin is per token, as the authors and TRL have it."""
    return (chosen_ratio_mean - rejected_ratio_mean - 1 / (2 * beta)) ** 2


def bco_losses(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """A binary classifier's loss of both answers: chosen is 1, rejected is 0."""
    return -F.logsigmoid(beta * chosen_ratio) - F.logsigmoid(-beta * rejected_ratio)


def kto_losses(
    ratio: torch.Tensor, wanted: torch.Tensor, divergence: float, beta: float, desirable: float, undesirable: float
) -> torch.Tensor:
    """1 - sigmoid(beta (ratio - z)) of a wanted answer, 1 - sigmoid(beta (z - ratio)) of another; z is `divergence`."""
    sign = torch.where(wanted, 1.0, -1.0)
    weight = torch.where(wanted, desirable, undesirable)
    return weight * (1 - torch.sigmoid(beta * sign * (ratio - divergence)))


def orpo_losses(chosen_mean: torch.Tensor, rejected_mean: torch.Tensor, beta: float) -> torch.Tensor:
    """-beta log sigmoid(log of the ratio of odds), odds(p) = p / (1 - p) of the geometric mean of token probabilities."""
    log_odds = (chosen_mean - rejected_mean) - (log1mexp(chosen_mean) - log1mexp(rejected_mean))
    return -beta * F.logsigmoid(log_odds)


def simpo_losses(
    chosen_mean: torch.Tensor, rejected_mean: torch.Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(beta (chosen_mean - rejected_mean) - gamma), smoothed."""
    return smoothed_log_sigmoid(beta * (chosen_mean - rejected_mean) - gamma, label_smoothing)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends. A probability of 1 counts as one ulp less: its odds are finite."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    small = x > -math.log(2.0)
    # Each branch sees only its own values: the gradient of the other one is not a number at the ends.
    near = torch.where(small, x, torch.full_like(x, -1.0))
    far = torch.where(small, torch.full_like(x, -1.0), x)
    return torch.where(small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))
