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

from ledger_of_stages import ACTIONS, measured

FEW = 80_000  # bytes: headers of files, what a tensor's rows are rounded up to, and small tensors


def check(strategy: str, ranks: list[int], folder: Path) -> None:
    found = {number: measured(strategy, number, folder / str(number)) for number in ranks}
    model = found[ranks[0]].model_bytes
    for number, result in found.items():
        for action, share in ACTIONS.items():
            for what, most in share.items():
                if (strategy, action, what) in {("ddp", "resume", "held"), ("ddp", "start", "held")}:
                    continue  # it holds whole weights: that is what DDP is
                bytes_ = result.most(action, what)
                assert bytes_ <= most * model / number + FEW, f"{strategy}, {number} ranks: {action} has {what} {bytes_:,} of {model:,}"
        whole = sum(ledger.written for ledger in result.ledgers["save"])
        assert 3 * model <= whole <= 3 * model + FEW * number, "weights and two moments are written once in all"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_handles_its_share_of_the_model(strategy: str, tmp_path: Path):
    check(strategy, [2, 4, 8], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_so_it_does_among_many(strategy: str, tmp_path: Path):
    check(strategy, [16, 32], tmp_path)
