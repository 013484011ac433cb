"""Writes trl_reference.json: losses, gradients and advantages by TRL's own code on small fixed inputs.

TRL is not a dependency of the tests. To make the file again: `pip install --target DIR --no-deps trl accelerate
datasets dill multiprocess xxhash`, then `PYTHONPATH=DIR python tests/unit/make_trl_reference.py`.

The loss is `GRPOTrainer._compute_loss` (loss_type dapo: sum over tokens / tokens of the batch), called with a stand-in
for the trainer whose model returns the given log-probabilities. The advantages repeat the four lines of
`_generate_and_score_completions` with TRL's `nanstd`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

CASES = {
    "on_policy": {},
    "clipped": {"old": True, "low": 0.2, "high": 0.28},
    "kl": {"beta": 0.04},
    "clipped_kl_entropy": {"old": True, "low": 0.2, "high": 0.2, "beta": 0.1, "entropy": 0.01},
    "responses": {"old": True, "low": 0.2, "high": 0.2, "beta": 0.1, "type": "grpo"},
    "constant": {"old": True, "low": 0.2, "high": 0.2, "type": "dr_grpo"},
    "gspo": {"old": True, "low": 0.05, "high": 0.08, "type": "grpo", "level": "sequence"},
    "sequence_tokens": {"old": True, "low": 0.05, "high": 0.08, "level": "sequence"},
    "cispo": {"old": True, "high": 0.15, "type": "cispo"},
    "ceiling": {"old": True, "low": 0.2, "high": 0.28, "ceiling": 1.3},
}
LONGEST = 8  # Dr. GRPO's constant


def trl_loss(case: dict, inputs: dict) -> tuple[float, list]:
    """TRL's loss and its gradient with respect to the log-probabilities [B, T]."""
    logprobs = torch.tensor(inputs["logprobs"], dtype=torch.float64, requires_grad=True)
    entropies = torch.tensor(inputs["entropies"], dtype=torch.float64)
    mask = torch.tensor(inputs["mask"], dtype=torch.float64)
    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=case.get("level", "token"), beta=case.get("beta", 0.0), loss_type=case.get("type", "dapo"),
        epsilon_low=case.get("low", 10.0), use_vllm=False, max_completion_length=LONGEST,
        epsilon_high=case.get("high", 1e9) + (1 if case.get("type") == "cispo" else 0),  # there it is the bound itself
        args=SimpleNamespace(delta=case.get("ceiling"), use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled="entropy" in case, use_adaptive_entropy=False, entropy_coef=case.get("entropy", 0.0),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True,
            gather_for_metrics=lambda x: x,
        ),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    batch = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": torch.tensor(inputs["advantages"], dtype=torch.float64), "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": torch.tensor(inputs["reference"], dtype=torch.float64),
    }  # fmt: skip
    if case.get("old"):
        batch["old_per_token_logps"] = torch.tensor(inputs["old"], dtype=torch.float64)
    loss = GRPOTrainer._compute_loss(self, None, batch)
    loss.backward()
    return float(loss), logprobs.grad.tolist()


def main() -> None:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths, width = [5, 3, 6, 1], 6
    logprobs = -3 * random(4, width)
    inputs = {
        "logprobs": logprobs.tolist(),
        "old": (logprobs + 0.8 * (random(4, width) - 0.5)).tolist(),
        "reference": (logprobs + 0.5 * (random(4, width) - 0.5)).tolist(),
        "entropies": (2 * random(4, width)).tolist(),
        "mask": [[1.0 if place < length else 0.0 for place in range(width)] for length in lengths],
        "advantages": (2 * random(4) - 1).tolist(),
    }
    rewards = torch.tensor([1.0, 0.0, 0.25, float("nan"), 0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    groups = rewards.view(-1, 4)
    centred = rewards - torch.nanmean(groups, dim=1).repeat_interleave(4)
    scaled = centred / (nanstd(groups, dim=1).repeat_interleave(4) + 1e-4)
    of_batch = centred / (nanstd(rewards) + 1e-4)
    reference = {
        "made_with": f"trl {trl.__version__}, torch {torch.__version__}",
        "inputs": inputs,
        "losses": {
            name: dict(zip(("loss", "gradient"), trl_loss(case, inputs)), **case) for name, case in CASES.items()
        },
        "rewards": [None if value != value else value for value in rewards.tolist()],
        "advantages": {
            "none": [None if value != value else value for value in centred.tolist()],
            "std": [None if value != value else value for value in scaled.tolist()],
            "batch": [None if value != value else value for value in of_batch.tolist()],
        },
    }
    Path(__file__).with_name("trl_reference.json").write_text(json.dumps(reference, indent=1) + "\n")


if __name__ == "__main__":
    main()
