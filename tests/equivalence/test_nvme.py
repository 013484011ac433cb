"""ZeRO-3 with optimizer or parameters on a local disk (NVMe) gives the numbers of one process, and resumes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packs import ALL_PARTS, tiny_recipe
from processes import run_ranks
from ranks import losses, stage_dir, train_stages

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from train_setup import small_model

WORKERS = 2


def values_of(parallel: dict[str, Any]) -> dict[str, Any]:
    """A model large enough (16 million parameters): DeepSpeed leaves what is smaller than a megabyte in memory."""
    return tiny_recipe(
        model=small_model(), train=ALL_PARTS, sequence_length=512, budget={"steps": 4}, batch={"packs": WORKERS},
        checkpoint={"every_steps": 2, "keep_last": 9}, parallel=parallel, precision="fp32",
    ).model_dump(mode="json")  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("reference")
    train_stages(0, 1, values_of({"strategy": "ddp"}), str(folder))
    return losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize("what", [("optimizer",), ("parameters",), ("optimizer", "parameters")], ids="-".join)
def test_offloading_to_a_disk_changes_no_number(tmp_path, expected, what):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(False):
        pytest.skip("DeepSpeed's asynchronous input and output needs libaio (apt install libaio-dev)")
    disk = tmp_path / "disk"
    disk.mkdir()
    offload = {f"offload_{name}": "nvme" for name in what}
    values = values_of({"strategy": "zero3", "nvme_path": str(disk), **offload})
    run_ranks(WORKERS, train_stages, values, str(tmp_path / "run"), timeout=240)
    written = sum(file.stat().st_size for file in disk.rglob("*") if file.is_file())
    assert written > 10e6  # it was the disk that held them
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-5)

    folder = stage_dir(tmp_path / "run", 0)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    run_ranks(WORKERS, train_stages, values, str(tmp_path / "run"), timeout=240)
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-5)
