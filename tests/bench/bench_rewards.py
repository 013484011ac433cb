"""CPU per judgement of the rule rewards, over pairs of responses and solutions.

    make bench-rewards                                   # this project's own pairs
    make bench-rewards ARGS="PAIRS.jsonl --package DIR"  # other pairs, or another checkout's `platform` folder

Each pair is judged once in this process (not in the sandbox, whose pipes cost the same whatever the rule does), by the function
that the sandbox would call, after one judgement per rule that pays for imports. A pair's time is that of the clock, in one
thread; the total beside it is processor time, which other load on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

OWN = Path(__file__).resolve().parents[1] / "unit" / "reward_pairs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", type=Path, default=[OWN])
    parser.add_argument("--package", type=Path, help="folder that holds the package `terrace`")
    args = parser.parse_args()
    if args.package:
        sys.path.insert(0, str(args.package))
    from terrace.rewards.registry import load_reward
    from terrace.rewards.types import RewardItem

    rows = [json.loads(line) for path in args.pairs for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    for rule in {row["rule"] for row in rows}:
        load_reward(rule)([RewardItem("", "1", "\\frac{1}{2}" if "reason" in rule or rule == "math" else [1, 2, 3, 4])])
    seconds, failed = [], 0
    begun = time.process_time()
    for row in rows:
        item = RewardItem("", row["response"], row["solution"], row.get("metadata", {}))
        started = time.perf_counter()
        try:
            load_reward(row["rule"])([item], **row.get("options", {}))
        except Exception:
            failed += 1
        seconds.append(time.perf_counter() - started)
    total = time.process_time() - begun
    ordered = sorted(seconds)
    print(
        f"{len(rows)} judgements, {failed} raised: processor time {total:.2f} s ({1000 * total / len(rows):.3f} ms each), "
        f"median {1000 * statistics.median(ordered):.3f} ms, p99 {1000 * ordered[int(0.99 * len(ordered))]:.2f} ms, "
        f"longest {1000 * ordered[-1]:.1f} ms"
    )


if __name__ == "__main__":
    main()
