"""The text-only guard of every family: a rank without a picture beside one with pictures, under the strategies that would hang."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapted import ADAPTED
from expert_steps import train_experts
from families import NAMES, QUICK
from family_ranks import STEPS, train_families
from processes import run_ranks

SHARED = ("kimi_k25", "gemma3", "paligemma")  # whose attention is more than causal over heads of one width
FIRST = [name for name in QUICK if name in ("qwen2_5_vl", "llava", "terrace_vlm")]  # merged, in rows and of parts: a guard each
OTHERS = [name for name in NAMES if name not in FIRST] + [*ADAPTED]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("names", [FIRST, *(pytest.param([name], marks=pytest.mark.slow) for name in OTHERS)], ids="+".join)
def test_two_ranks_one_of_them_without_a_picture_equal_one_process(tmp_path, names):
    torch.set_num_threads(1)
    alone = train_families(0, 1, names, ["ddp"], str(tmp_path))
    together = run_ranks(2, train_families, names, ["ddp", "fsdp", "zero3"], str(tmp_path), timeout=500)[0]
    for name in names:
        assert len(alone[name, "ddp"]) == STEPS
        for strategy in ("ddp", "fsdp", "zero3"):
            np.testing.assert_allclose(together[name, strategy], alone[name, "ddp"], rtol=2e-5, err_msg=f"{name} under {strategy}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_that_share_a_pack_equal_one_process(tmp_path):
    """Narrower values (latent attention), and groups and windows of the whole pack, through the all-to-all of sequence parallelism."""
    torch.set_num_threads(1)
    packs, shared = [[0, 1], [2, 3, 4]], {"parallel": {"strategy": "ddp", "sequence_parallel": 2}}
    for name in SHARED:
        [alone] = train_experts(0, 1, name, [("ddp", packs, {})], str(tmp_path / name))
        [together] = run_ranks(2, train_experts, name, [("ddp", packs, shared)], str(tmp_path / name), timeout=800)[0]
        for line, other in zip(alone[1:3], together[1:3]):
            np.testing.assert_allclose([other["loss"], other["grad_norm"]], [line["loss"], line["grad_norm"]], rtol=1e-4, err_msg=name)
