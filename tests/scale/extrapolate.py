"""The tables of docs/performance.md on bytes per rank: measured with tiny models at 2 to 32 ranks, and what that makes of large ones.

    python tests/scale/extrapolate.py

Every quantity is fitted, over all numbers of ranks and two widths of model, as a * model/ranks + b * model + c * tensors (headers and
indices), with a, b and c not negative. An export's is not: it ends at the largest tensor, which lies whole in one file. The last columns
are the fit's, for 256 ranks: nothing of that size ran.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from ledger_of_stages import ACTIONS, Measured, measured

RANKS = {128: [2, 4, 8, 16, 32], 256: [2, 8, 32]}  # by width of the language model
QUANTITIES = ("read", "written", "received", "held")
LARGE = {"7B": (4 * 8_292_166_656, 729), "72B": (4 * 73_410_777_344, 1_353)}  # Qwen2.5-VL: bytes in float32, tensors
MANY = 256


def terms(model: float, tensors: int, ranks: int) -> list[float]:
    return [model / ranks, model, tensors]


def fitted(rows: list[tuple[list[float], float]]) -> np.ndarray:
    """Coefficients of `terms`, none negative: of the fits that leave some of them out, the best by relative error."""
    count = len(rows[0][0])
    matrix, values = np.array([row for row, _ in rows]), np.array([value for _, value in rows])
    best, found = np.inf, np.zeros(count)
    for mask in range(1, 2**count):
        chosen = [place for place in range(count) if mask >> place & 1]
        part = matrix[:, chosen] / values[:, None]
        solution = np.linalg.lstsq(part, np.ones(len(values)), rcond=None)[0]
        error = float(((part @ solution - 1) ** 2).sum())
        if (solution >= 0).all() and error < best:
            best, found = error, np.zeros(count)
            found[chosen] = solution
    return found


def main() -> None:
    for strategy in sys.argv[1:] or ["fsdp", "ddp"]:
        runs: list[tuple[int, Measured]] = []
        for width, numbers in RANKS.items():
            for ranks in numbers:
                with tempfile.TemporaryDirectory() as folder:
                    runs.append((ranks, measured(strategy, ranks, Path(folder) / "stage", width)))
        small = [(ranks, run) for ranks, run in runs if run.model_bytes == runs[0][1].model_bytes]
        print(f"\n{strategy}, a model of {small[0][1].model_bytes / 1e6:.1f} MB; MB of the rank that has most\n")
        print(f"| | {' | '.join(f'{ranks} ranks' for ranks, _ in small)} | {' | '.join(f'{name} at {MANY}, GB' for name in LARGE)} |")
        print("|---|" + "---|" * (len(small) + len(LARGE)))
        for action in ACTIONS:
            for what in QUANTITIES:
                if max(run.most(action, what) for _, run in small) < 60_000:
                    continue
                rows = [(terms(run.model_bytes, run.tensors, ranks), run.most(action, what)) for ranks, run in runs]
                fit = fitted(rows)
                large = [f"{float(fit @ terms(*sizes, MANY)) / 1e9:.2f}" for sizes in LARGE.values()]
                if action == "export":
                    large = ["not fitted"] * len(LARGE)
                cells = [f"{run.most(action, what) / 1e6:.2f}" for _, run in small] + large
                print(f"| {action}: {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
