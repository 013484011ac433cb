"""The losses of comparing objectives: values and gradients of the formulas written out, and of TRL's own code where it is installed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from terrace.objectives import preference_losses as losses

BETA, SMOOTHING = 0.3, 0.15


def made(pairs: int = 6, length: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token log-probabilities [2 pairs, length] (chosen ones first), the reference's, and which tokens belong to the answer."""
    generator = torch.Generator().manual_seed(3)
    tokens = -torch.rand(2 * pairs, length, generator=generator) * 3 - 0.01
    reference = tokens + torch.randn(2 * pairs, length, generator=generator)
    lengths = torch.randint(1, length + 1, (2 * pairs, 1), generator=generator)
    return tokens, reference, (torch.arange(length)[None] < lengths).float()


def sums(tokens: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """log-probabilities and ratios of chosen and rejected answers, and their lengths."""
    logprobs, ratio = (tokens * mask).sum(1), ((tokens - reference) * mask).sum(1)
    return (*logprobs.chunk(2), *ratio.chunk(2), *mask.sum(1).chunk(2))


def ours(kind: str, tokens: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    chosen, rejected, chosen_ratio, rejected_ratio, chosen_tokens, rejected_tokens = sums(tokens, reference, mask)
    if kind == "sigmoid":
        return losses.dpo_losses(chosen_ratio, rejected_ratio, BETA).mean()
    if kind == "smoothed":
        return losses.dpo_losses(chosen_ratio, rejected_ratio, BETA, SMOOTHING).mean()
    if kind == "robust":
        return losses.robust_losses(chosen_ratio, rejected_ratio, BETA, SMOOTHING).mean()
    if kind == "ipo":
        return losses.ipo_losses(chosen_ratio / chosen_tokens, rejected_ratio / rejected_tokens, BETA).mean()
    if kind == "bco_pair":
        return losses.bco_losses(chosen_ratio, rejected_ratio, BETA).mean()
    if kind == "orpo":
        return losses.orpo_losses(chosen / chosen_tokens, rejected / rejected_tokens, BETA).mean()
    if kind == "simpo":
        return losses.simpo_losses(chosen / chosen_tokens, rejected / rejected_tokens, 2.0, 0.7).mean()
    wanted = torch.arange(len(tokens)) < len(tokens) // 2
    return losses.kto_losses(torch.cat([chosen_ratio, rejected_ratio]), wanted, 0.4, BETA, 1.2, 0.8).mean()


def written_out(kind: str, tokens: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The published formulas, pair by pair, in float64 and without the library's log-sigmoid."""
    chosen, rejected, chosen_ratio, rejected_ratio, chosen_tokens, rejected_tokens = (
        values.double() for values in sums(tokens, reference, mask)
    )
    total = torch.zeros((), dtype=torch.float64)

    def sigmoid(x: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + torch.exp(-x))

    for n in range(len(chosen)):
        margin = BETA * (chosen_ratio[n] - rejected_ratio[n])
        if kind == "sigmoid":
            total = total - torch.log(sigmoid(margin))
        elif kind == "smoothed":
            total = total - (1 - SMOOTHING) * torch.log(sigmoid(margin)) - SMOOTHING * torch.log(sigmoid(-margin))
        elif kind == "robust":
            clean, flipped = -torch.log(sigmoid(margin)), -torch.log(sigmoid(-margin))
            total = total + ((1 - SMOOTHING) * clean - SMOOTHING * flipped) / (1 - 2 * SMOOTHING)
        elif kind == "ipo":
            total = total + (chosen_ratio[n] / chosen_tokens[n] - rejected_ratio[n] / rejected_tokens[n] - 1 / (2 * BETA)) ** 2
        elif kind == "bco_pair":
            total = total - torch.log(sigmoid(BETA * chosen_ratio[n])) - torch.log(1 - sigmoid(BETA * rejected_ratio[n]))
        elif kind == "orpo":
            p, q = torch.exp(chosen[n] / chosen_tokens[n]), torch.exp(rejected[n] / rejected_tokens[n])
            total = total - BETA * torch.log(sigmoid(torch.log((p / (1 - p)) / (q / (1 - q)))))
        elif kind == "simpo":
            total = total - torch.log(sigmoid(2.0 * (chosen[n] / chosen_tokens[n] - rejected[n] / rejected_tokens[n]) - 0.7))
        else:
            total = total + 1.2 * (1 - sigmoid(BETA * (chosen_ratio[n] - 0.4))) + 0.8 * (1 - sigmoid(BETA * (0.4 - rejected_ratio[n])))
    return total / (len(chosen) * (2 if kind == "kto" else 1))


def value_and_gradient(function: Any, kind: str) -> tuple[float, torch.Tensor]:
    tokens, reference, mask = made()
    tokens.requires_grad_(True)
    value = function(kind, tokens, reference, mask)
    value.backward()
    return float(value.detach()), tokens.grad


KINDS = ("sigmoid", "smoothed", "robust", "ipo", "bco_pair", "orpo", "simpo", "kto")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_its_formula(kind):
    value, gradient = value_and_gradient(ours, kind)
    expected, slope = value_and_gradient(written_out, kind)
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-7)
    assert gradient.abs().max() > 1e-3


def trl_loss(kind: str, tokens: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`DPOTrainer._compute_loss` and its like on a model that answers with the given log-probabilities."""
    if kind in ("orpo", "simpo"):
        chosen, rejected, *_, chosen_tokens, rejected_tokens = sums(tokens, reference, mask)
        means = chosen / chosen_tokens, rejected / rejected_tokens
        trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"), alpha=0.0, loss_type="simpo", label_smoothing=0.0)
        if kind == "orpo":
            from trl.experimental.orpo.orpo_trainer import ORPOTrainer

            return -ORPOTrainer.odds_ratio_loss(trainer, *means)[0].mean()
        from trl.experimental.cpo.cpo_trainer import CPOTrainer

        trainer.beta, trainer.simpo_gamma = 2.0, 0.7
        return CPOTrainer.cpo_loss(trainer, *means)[0].mean()
    if kind == "kto":
        from trl.trainer.kto_trainer import KTOTrainer as Trainer
    else:
        from trl.trainer.dpo_trainer import DPOTrainer as Trainer
    count = len(tokens)
    filler = torch.zeros(count, tokens.shape[1])
    outputs = SimpleNamespace(
        log_probs=tokens * mask, entropy=filler, mean_logits=filler, is_top1=filler.bool(), log_sum_sq_probs=filler, loss=None
    )

    def model(**_: Any) -> Any:
        return outputs

    whole = torch.cat([torch.zeros(count, 1), mask], dim=1).long()
    reference_sums = (reference * mask).sum(1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), beta=BETA, accelerator=SimpleNamespace(
            device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        loss_types=[kind], loss_weights=[1.0], label_smoothing=SMOOTHING, _metrics={"train": __import__("collections").defaultdict(list)},
        _total_train_tokens=0, _tp_size=1, loss_type="kto", calculate_KL=True, desirable_weight=1.2, undesirable_weight=0.8,
        _compute_kl_logps=lambda *_: torch.full((count,), 0.4),
    )  # fmt: skip
    inputs = {"input_ids": torch.zeros_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole}
    if kind == "kto":
        label = torch.arange(count) < count // 2
        inputs |= {"label": label, "ref_logps": reference_sums, "ref_KL_logps": torch.zeros(count)}
    else:
        chosen, rejected = reference_sums.chunk(2)
        inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return Trainer._compute_loss(trainer, model, inputs, False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "smoothed"])
def test_a_loss_is_that_of_trl(kind):
    pytest.importorskip("trl", reason="TRL is not installed; the formulas above are what it computes")
    value, gradient = value_and_gradient(ours, kind)
    expected, slope = value_and_gradient(trl_loss, kind)
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-7)


def test_certain_answers_have_finite_odds_and_gradients():
    chosen = torch.tensor([0.0, -1e-8, -50.0, -math.log(2.0)], requires_grad=True)
    loss = losses.orpo_losses(chosen, torch.tensor([-0.5, 0.0, -1e-3, -90.0]), BETA).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(chosen.grad).all()
