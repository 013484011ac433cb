"""How long training waits for a checkpoint: two gloo processes, one thread each, a checkpoint after every second step.

    python tests/bench/bench_checkpoint.py [--strategies fsdp ddp] [--tiny]

Waited for: from the end of a step's line to the start of the next step, that is the copy of what the rank holds, and what is not yet
written of the checkpoint before. Files go to a temporary folder (TMPDIR). The first checkpoint also makes its buffers, so it stands apart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from processes import run_ranks
from ranks import Step
from train_setup import bench_recipe, full_pack, middle_model, tiny_model

EVERY, SAVED = 2, 6  # steps between checkpoints, checkpoints
RANKS = 2


def waits(rank: int, ranks: int, strategies: list[str], tiny: bool, folder: str) -> dict[str, dict[str, Any]]:
    """By strategy: seconds of every wait of this rank, of every step's line, and the bytes of one checkpoint."""
    import torch

    from terrace.models.build import model_config
    from terrace.objectives.interface import StageFeed
    from terrace.objectives.lm import LanguageModelling
    from terrace.train.loop import StageInProgress, train_stage
    from terrace.worker.context import WorkerContext

    torch.set_num_threads(1)
    found, real, length = {}, StageInProgress.save, 64 if tiny else 256
    for name in strategies:
        recipe = bench_recipe(
            tiny_model() if tiny else middle_model(), EVERY * SAVED, ranks, length, parallel={"strategy": name},
            checkpoint={"every_steps": EVERY, "keep_last": 1},
        )  # fmt: skip
        seconds: list[float] = []

        def save(run: StageInProgress, line: dict[str, Any], seconds: list[float] = seconds) -> None:
            began = time.perf_counter()
            real(run, line)
            seconds.append(time.perf_counter() - began)

        def stream(start: int) -> Iterator[Step]:
            for step in range(start, EVERY * SAVED):
                yield Step(step, [full_pack(step * ranks + rank, length, 2)])

        feed = StageFeed(
            config=model_config(recipe.model), total_steps=EVERY * SAVED, stream=stream, state=lambda step: {"pack": step},
            restore=lambda state: None,
        )  # fmt: skip
        place = Path(folder) / name
        began = time.perf_counter()
        with mock.patch.object(StageInProgress, "save", save):
            train_stage(recipe, 0, feed, place, None, WorkerContext(rank=rank, world_size=ranks, local_rank=rank), LanguageModelling)
        newest = max((place / "checkpoints").glob("step-*"))
        found[name] = {
            "waits": seconds, "stage": time.perf_counter() - began, "bytes": sum(file.stat().st_size for file in newest.iterdir()),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["fsdp", "ddp"])
    parser.add_argument("--tiny", action="store_true", help="a model for testing this script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        by_rank = run_ranks(RANKS, waits, options.strategies, options.tiny, folder, timeout=900)
    for name in options.strategies:
        runs = [found[name] for found in by_rank]
        later = [max(waited) for waited in zip(*(run["waits"][1:] for run in runs), strict=True)]
        first = max(run["waits"][0] for run in runs)
        print(
            f"{name}: {runs[0]['bytes'] / 1e6:.0f} MB; first {first:.3f} s, later {median(later):.3f} s "
            f"({', '.join(f'{value:.3f}' for value in later)}); the stage {max(run['stage'] for run in runs):.1f} s"
        )


if __name__ == "__main__":
    main()
