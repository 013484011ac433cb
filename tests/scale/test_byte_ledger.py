"""What a rank holds, reads, writes and receives at growing numbers of ranks: a share of the model, never the model.

Saving, resuming, starting from a directory and exporting run under the ledger with tiny models of two sizes. DDP holds whole weights on
every rank, so it receives them; it reads and writes its share. `python tests/scale/extrapolate.py` makes the table of
docs/performance.md from the same measurements.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from ledger_of_stages import SHARES, WHOLE, measured

FEW = 80_000  # bytes: headers of files, what a tensor's rows are rounded up to, and small tensors
LARGEST = 0.15  # of the model, its largest tensor: a file of a final directory holds it whole


def check(strategy: str, numbers: list[int], folder: Path) -> None:
    for ranks in numbers:
        found = measured(strategy, ranks, folder / str(ranks))
        model = found.model_bytes
        for action, share in SHARES.items():
            for what, most in share.items():
                limit = most / ranks + (LARGEST if action == "export" and most else 0.0)
                if strategy == "ddp":
                    limit = WHOLE.get((action, what), limit)
                bytes_ = found.most(action, what)
                assert bytes_ <= limit * model + FEW, f"{strategy}, {ranks} ranks: {action} has {what} {bytes_:,} of {model:,} bytes"
        whole = sum(ledger.written for ledger in found.ledgers["save"])
        assert 3 * model <= whole <= 3 * model + FEW * ranks, "weights and two moments are written once in all"


@pytest.mark.parametrize(("strategy", "numbers"), [
    pytest.param("fsdp", [2, 4], id="fsdp"),
    pytest.param("ddp", [2, 4, 8], id="ddp", marks=pytest.mark.slow),
    pytest.param("fsdp", [8, 16, 32], id="fsdp-many", marks=pytest.mark.slow),
    pytest.param("ddp", [16, 32], id="ddp-many", marks=pytest.mark.slow),
])
def test_a_rank_handles_its_share_of_the_model(strategy: str, numbers: list[int], tmp_path: Path):
    check(strategy, numbers, tmp_path)
