"""What a rank holds, reads, writes and receives at growing numbers of ranks: a share of the model, and whole models only where the
strategy holds whole weights, a number of them that does not grow.

Starting from a directory, saving, resuming and exporting run under the ledger with tiny models. `python tests/scale/extrapolate.py`
makes the table of docs/performance.md from the same measurements.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from ledger_of_stages import LIMITS, OWN_LIMITS, measured

FEW = 80_000  # bytes: headers of files, what a tensor's rows are rounded up to, and small tensors


@pytest.mark.parametrize(("strategy", "numbers"), [
    pytest.param("fsdp", [2, 4], id="fsdp"),
    pytest.param("fsdp", [8, 16, 32], id="fsdp-many", marks=pytest.mark.slow),
    pytest.param("fsdp-every-pack", [2, 4, 8, 16, 32], id="fsdp-every-pack", marks=pytest.mark.slow),
    pytest.param("ddp", [2, 4, 8, 16, 32], id="ddp", marks=pytest.mark.slow),
    *(pytest.param(name, [2, 4], id=name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3")),
])
def test_a_rank_handles_its_share_of_the_model(strategy: str, numbers: list[int], tmp_path: Path):
    for ranks in numbers:
        found = measured(strategy, ranks, tmp_path / str(ranks))
        model = found.model_bytes
        if strategy == "fsdp":
            assert found.most("accumulate", "held") > 0.9 * model, "the instrument sees gradients"
        for (action, what), limit in (LIMITS | OWN_LIMITS[strategy]).items():
            share, whole = limit
            most = model * (share / ranks + whole) + FEW
            if action == "export" and share:
                most += found.largest * (2 if what == "held" else 1)  # a file of a final directory has whole tensors
            bytes_ = found.most(action, what)
            assert bytes_ <= most, f"{strategy}, {ranks} ranks: {action} has {what} {bytes_:,} of {model:,} bytes, at most {most:,.0f}"
        in_all = sum(ledger.written for ledger in found.ledgers["save"])
        assert 3 * model <= in_all <= 3 * model + FEW * ranks, "weights and two moments are written once in all"
