"""What small models spend beside their own products: Muon's step and the embedding of patches. On one thread of a CPU.

    make bench-small-steps

*muon*: a step over the matrices of `jobs/recipes/demo.yaml` for the same step of torch.optim.Muon, once with the processor as it is and
once with oneDNN held to AVX2, as on a laptop without bf16 instructions (there ours works in float32).
*patches*: forward and backward of a tower's patch embedding (504 patches, 96 wide) as a product, for the convolution.

The two sides of a ratio take turns in one process; seconds are those of the processor, medians of `--rounds`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from terrace.models.patch_products import as_products
from terrace.train import muon

# Shapes and numbers of the demo's matrices that Muon steps: merger, language layers, vision blocks.
MATRICES = {
    (384, 384): 1, (128, 384): 1, (256, 128): 8, (128, 256): 4, (128, 128): 8, (64, 128): 8, (288, 96): 2, (96, 96): 2, (192, 96): 4,
    (96, 192): 2,
}  # fmt: skip
OPTIONS = {"lr": 2e-3, "momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}


def medians(sides: list[Callable[[], object]], rounds: int) -> list[float]:
    """Processor seconds of each side."""
    taken: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 3):
        for side, times in zip(sides, taken, strict=True):
            started = time.process_time()
            side()
            if turn >= 3:
                times.append(time.process_time() - started)
    return [statistics.median(times) for times in taken]


def muon_sides() -> list[Callable[[], object]]:
    optimizers = []
    for kind in (muon.Muon, torch.optim.Muon):
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape, number in MATRICES.items() for _ in range(number)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizers.append(kind(weights, **OPTIONS))
    return [optimizer.step for optimizer in optimizers]


def patch_sides() -> list[Callable[[], object]]:
    patches = torch.randn(504, 3, 2, 14, 14)
    sides = []
    for product in (True, False):
        tower = torch.nn.Sequential(torch.nn.Conv3d(3, 96, (2, 14, 14), stride=(2, 14, 14), bias=False))
        if product:
            as_products(tower)
        sides.append(lambda tower=tower: tower(patches).sum().backward())
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only-muon", metavar="PROCESSOR", help="for the process that is held to AVX2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs = medians(muon_sides(), args.rounds)
    dtype = str(muon.products_in("cpu")).removeprefix("torch.")
    where = args.only_muon or "processor as it is"
    print(f"muon, {where}: {ours * 1e3:.1f} ms in {dtype}, torch {theirs * 1e3:.1f} ms: {ours / theirs:.2f}")
    if args.only_muon:
        return
    ours, theirs = medians(patch_sides(), args.rounds)
    print(f"patches: {ours * 1e3:.1f} ms, convolution {theirs * 1e3:.1f} ms: {ours / theirs:.2f}", flush=True)
    held = (
        "import sys, torch; torch.cpu._is_avx512_bf16_supported = lambda: False; "
        "sys.argv = ['bench', '--rounds', '5', '--only-muon', 'held to AVX2']; import bench_small_steps; bench_small_steps.main()"
    )
    subprocess.run(
        [sys.executable, "-c", held], check=True, cwd=os.path.dirname(os.path.abspath(__file__)),
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
    )  # fmt: skip


if __name__ == "__main__":
    main()
