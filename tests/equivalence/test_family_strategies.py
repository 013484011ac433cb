"""The text-only guard of every family: a rank without a picture beside one with pictures, under the strategies that would hang."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import NAMES, QUICK
from family_ranks import STEPS, train_families
from processes import run_ranks

OTHERS = [name for name in NAMES if name not in QUICK]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("names", [list(QUICK), *(pytest.param([name], marks=pytest.mark.slow) for name in OTHERS)], ids="+".join)
def test_two_ranks_one_of_them_without_a_picture_equal_one_process(tmp_path, names):
    torch.set_num_threads(1)
    alone = train_families(0, 1, names, ["ddp"], str(tmp_path))
    together = run_ranks(2, train_families, names, ["ddp", "fsdp", "zero3"], str(tmp_path), timeout=500)[0]
    for name in names:
        assert len(alone[name, "ddp"]) == STEPS
        for strategy in ("ddp", "fsdp", "zero3"):
            np.testing.assert_allclose(together[name, strategy], alone[name, "ddp"], rtol=2e-5, err_msg=f"{name} under {strategy}")
