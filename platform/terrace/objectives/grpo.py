"""The policy objective: GRPO as published for MORL, and its relatives by options.

Per token t of response i, with advantage A_i (rl.advantages):

    ratio = exp(logp - logp_old)          MORL: one update per rollout, logp_old = stop_gradient(logp), so the ratio is 1
            exp(mean of logp - logp_old over the response)                                     (`sequence`: GSPO, eq. 7)
    J_t   = min(min(ratio, ceiling) A_i, clip(ratio, 1 - clip_low, 1 + clip_high) A_i)         (without a clip: ratio A_i)
            stop_gradient(min(ratio, 1 + clip_high)) A_i logp                                  (`cispo`: MiniMax-M1, eq. 4)
    loss  = sum_t w_t [ -J_t + kl (exp(ref - logp) - (ref - logp) - 1) - entropy_coefficient H_t ]

J_t of a token that other weights have sampled is multiplied by stop_gradient(exp(logp_old - logp_sampled)) (`correction`: of the token,
or summed over its response), at most `correction_bound`; what lies above is cut to it, or 0 (`correction_masks`): truncated importance
sampling.

w_t is 1, and the sum is divided by the response tokens of the whole global batch (token mean, as in MORL eq. 1 and DAPO); with
`average: responses` w_t is 1 / tokens of the response, and the divisor the responses; with `constant` w_t is 1 and the divisor
responses x longest response (Dr. GRPO). The loop divides through the strategy's `scale`, so neither packing nor ranks can
change it. Log-probabilities are those of the
sampling distribution: logits divided by the temperature, media tokens left out. Rows of logits exist `chunk_tokens` at
a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from terrace.models.batch import DeviceBatch
from terrace.models.families.registry import output_layer
from terrace.models.shared_prompt import Unit, units_hidden

NEVER = -1e30  # a logit of what is never sampled, finite, so that 0 times it is 0


@dataclass(frozen=True)
class PolicyOptions:
    """What the loss needs of the recipe's GrpoOptions."""

    temperature: float = 1.0
    clip_low: float | None = None
    clip_high: float | None = None
    clip_ceiling: float | None = None
    sequence_ratio: bool = False
    cispo: bool = False
    per_response: bool = False  # a token weighs 1 / tokens of its response
    correction: str | None = None  # token, sequence
    correction_bound: float = 2.0
    correction_masks: bool = False
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    forbidden: tuple[int, ...] = ()  # token ids that are never sampled
    chunk_tokens: int = 1024
    one_head_call: bool = False  # ZeRO-3: every call of the output layer is a collective, so ranks must make equally many


@dataclass
class PolicyBatch:
    """One pack of units for the policy step; M response tokens. `results` is filled by the loss."""

    batch: DeviceBatch
    units: list[Unit]
    rows: torch.Tensor  # int64 [M]: the place in the pack whose logits predict the token
    tokens: torch.Tensor  # int64 [M]
    advantages: torch.Tensor  # float32 [M]
    lengths: torch.Tensor  # int64 [responses]: tokens of each, in order; they add up to M
    old_logprobs: torch.Tensor | None = None  # float32 [M]; None: on-policy, the ratio is 1
    reference_logprobs: torch.Tensor | None = None  # float32 [M], for the KL term
    sampled_logprobs: torch.Tensor | None = None  # float32 [M], of the weights that sampled each token, for the correction
    results: dict[str, torch.Tensor] = field(default_factory=dict)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 [N]: log-probability of each row's token under softmax(logits / scale). logits float32 [N, V]."""
    tempered = logits / scale if scale != 1.0 else logits
    return tempered.gather(1, tokens.unsqueeze(1)).squeeze(1) - torch.logsumexp(tempered, dim=1)


def token_losses(
    logprobs: torch.Tensor,
    entropies: torch.Tensor,
    advantages: torch.Tensor,
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
    options: PolicyOptions,
    lengths: torch.Tensor | None = None,
    sampled: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss per token [N] and the sums (clipped tokens, KL, importance weights) that become metrics. All float32 [N].

    `lengths` int64 [responses] add up to N; only what looks at whole responses needs them.
    """
    moved = logprobs - (logprobs.detach() if old is None else old)
    if options.sequence_ratio:
        assert lengths is not None
        moved = response_means(moved, lengths)
    objective, clipped = _surrogate(torch.exp(moved), logprobs, advantages, options)
    sums = {"clipped": clipped}
    if options.correction is not None and sampled is not None:
        weights, held = importance_weights((logprobs.detach() if old is None else old) - sampled, options, lengths)
        objective = objective * weights
        sums |= {"importance": weights.sum(), "held": held.sum().float()}
    losses = -objective
    divergence = torch.zeros((), device=logprobs.device)
    if reference is not None:
        difference = reference - logprobs
        kl = torch.exp(difference) - difference - 1
        divergence = kl.detach().sum()
        losses = losses + options.kl_coefficient * kl
    if options.entropy_coefficient:
        losses = losses - options.entropy_coefficient * entropies
    if options.per_response:
        assert lengths is not None
        losses = losses / lengths.repeat_interleave(lengths)
    return losses, {**sums, "kl": divergence}


def importance_weights(
    moved: torch.Tensor, options: PolicyOptions, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 [N] of tokens whose log-probability has moved by `moved` since they were sampled, and which a bound holds back.
    Where it is not known (NaN) the weight is 1."""
    moved = moved.nan_to_num(nan=0.0)
    if options.correction == "sequence":
        assert lengths is not None
        moved = response_means(moved, lengths) * lengths.repeat_interleave(lengths)
    weights = torch.exp(moved)
    held = weights > options.correction_bound
    bounded = 0.0 if options.correction_masks else options.correction_bound
    return weights.masked_fill(held, bounded), held


def _surrogate(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, options: PolicyOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to rise, float32 [N], and how many tokens a clip holds back."""
    low = 0.0 if options.clip_low is None else 1 - options.clip_low
    high = float("inf") if options.clip_high is None else 1 + options.clip_high
    if options.cispo:
        weight = ratio.detach()
        return weight.clamp(max=high) * advantages * logprobs, (weight > high).sum().float()
    objective, held = ratio * advantages, torch.zeros_like(ratio, dtype=torch.bool)
    if options.clip_ceiling is not None:
        held = (ratio > options.clip_ceiling) & (advantages < 0)
        objective = ratio.clamp(max=options.clip_ceiling) * advantages
    if options.clip_low is not None or options.clip_high is not None:
        bounded = ratio.clamp(low, high) * advantages
        held = held | (bounded < objective)
        objective = torch.minimum(objective, bounded)
    return objective, held.sum().float()


def response_means(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """float32 [N]: each token gets the mean over its response; `lengths` int64 [responses] add up to N."""
    owner = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    sums = torch.zeros(len(lengths), dtype=values.dtype, device=values.device).index_add(0, owner, values)
    return (sums / lengths).index_select(0, owner)


def logprobs_and_entropies(
    model: Any, hidden: torch.Tensor, tokens: torch.Tensor, forbidden: torch.Tensor, scale: float, entropy_trains: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N] each, of rows of hidden states [N, H]. Without `entropy_trains` the entropies have no gradient, and the logits exist
    once: they become the probabilities that backward needs."""
    logits = output_layer(model)(hidden).float()
    if not entropy_trains:
        return _LogprobsAndEntropies.apply(logits, tokens, forbidden, scale)
    if len(forbidden):
        logits = logits.index_fill(1, forbidden, float("-inf"))
    tempered = logits / scale if scale != 1.0 else logits
    logged = torch.log_softmax(tempered, dim=1)
    entropies = -(logged.exp() * logged.masked_fill(torch.isinf(logged), 0.0)).sum(dim=1)
    return logged.gather(1, tokens.unsqueeze(1)).squeeze(1), entropies


class _LogprobsAndEntropies(torch.autograd.Function):
    """`logprobs_and_entropies` of logits [N, V], which it overwrites."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, tokens: torch.Tensor, forbidden: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = tokens.unsqueeze(1)
        if len(forbidden):
            logits.index_fill_(1, forbidden, NEVER)
        if scale != 1.0:
            logits.div_(scale)
        chosen = logits.gather(1, wanted).squeeze(1)
        probabilities = torch.softmax(logits, dim=1)
        # The largest probability is 1 / sum exp(logit - largest logit).
        normaliser = logits.amax(dim=1) - probabilities.amax(dim=1).log()
        entropies = normaliser - logits.mul_(probabilities).sum(dim=1)
        ctx.save_for_backward(probabilities, wanted)
        ctx.scale = scale
        ctx.mark_non_differentiable(entropies)
        return chosen - normaliser, entropies

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probabilities, wanted = ctx.saved_tensors
        slope = (upstream / ctx.scale).unsqueeze(1)
        return (probabilities * -slope).scatter_add_(1, wanted, slope), None, None, None


def summed_policy_loss(model: Any, batch: PolicyBatch, options: PolicyOptions) -> torch.Tensor:
    """Float32 scalar: the sum of the token losses of a pack. Fills `batch.results` with what metrics need."""
    hidden = units_hidden(model, batch.batch, batch.units)
    forbidden = torch.tensor(options.forbidden, dtype=torch.int64, device=hidden.device)
    selected = hidden.index_select(0, batch.rows)
    logprobs, entropies = [], []
    size = max(len(batch.rows), 1) if options.one_head_call else options.chunk_tokens
    parts = zip(selected.split(size), batch.tokens.split(size))
    entropy_trains = bool(options.entropy_coefficient)
    chunked = torch.is_grad_enabled() and len(batch.rows) > size
    for rows, tokens in parts if len(batch.rows) else ():
        if chunked:
            made = checkpoint(
                logprobs_and_entropies, model, rows, tokens, forbidden, options.temperature, entropy_trains, use_reentrant=False
            )
        else:
            made = logprobs_and_entropies(model, rows, tokens, forbidden, options.temperature, entropy_trains)
        logprobs.append(made[0])
        entropies.append(made[1])
    if not logprobs:  # a pack without responses still runs the model, for the collectives
        return 0.0 * output_layer(model)(hidden[:1]).float().sum()
    joined, entropy = torch.cat(logprobs), torch.cat(entropies)
    losses, sums = token_losses(
        joined, entropy, batch.advantages, batch.old_logprobs, batch.reference_logprobs, options, batch.lengths,
        batch.sampled_logprobs,
    )  # fmt: skip
    batch.results = {"logprobs": joined.detach(), "entropies": entropy.detach(), **sums}
    return losses.sum()


def response_rows(units: Sequence[Unit], lengths: Sequence[Sequence[int]]) -> list[int]:
    """For each response token in order, the place in the pack whose logits predict it.

    `lengths` are the responses' tokens including the last one, which is predicted but never fed: a response of n tokens
    has n - 1 rows in the pack. The first token of every response is predicted by the prompt's last row.
    """
    rows: list[int] = []
    for unit, unit_lengths in zip(units, lengths):
        begin = unit.start + unit.prompt
        for length in unit_lengths:
            rows.append(unit.start + unit.prompt - 1)
            rows.extend(range(begin, begin + length - 1))
            begin += length - 1
    return rows
