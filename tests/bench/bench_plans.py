"""Seconds of `terrace plan NAME` for every shipped recipe, each in a process of its own: `python tests/bench/bench_plans.py [NAME...]`.

Prints a line per recipe, slowest first at the end, and ends with an error where one takes longer than its limit.
"""

from __future__ import annotations

import subprocess
import sys
import time

from terrace.recipe.loading import load_recipe
from terrace.recipe.shipped import names

LIMIT_SECONDS = 20


def seconds_of(name: str) -> float:
    """Of the whole command, with the start of Python. Raises CalledProcessError where the plan fails."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "terrace.cli", "plan", name], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main(wanted: list[str]) -> int:
    taken: dict[str, float] = {}
    for name in wanted or names():
        if load_recipe(name).model.pretrained is None:  # else a template over a checkpoint of the reader's own
            taken[name] = seconds_of(name)
            print(f"{name} {taken[name]:.1f}", flush=True)
    slowest = sorted(taken, key=taken.__getitem__, reverse=True)[:5]
    print("slowest:", ", ".join(f"{name} {taken[name]:.1f} s" for name in slowest))
    late = [name for name, seconds in taken.items() if seconds > LIMIT_SECONDS]
    return 1 if late else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
