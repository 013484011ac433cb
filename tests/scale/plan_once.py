"""A process that opens, plans and resumes a stage of a synthetic index, and says how long it took and what stays in its memory.

    python plan_once.py <data folder> <budget as JSON> <pack to resume at>

Prints one JSON line: seconds by the clock and of CPU, MiB. Seconds of imports are not counted; memory is what came after them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np


def memory() -> dict[str, float]:
    """MiB of this process: its own, and of files; a mapped page that several processes use counts in parts (`proportional`)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    mebi = {name: int(lines[name].split()[0]) / 1024 for name in ("Rss", "Pss", "Pss_File", "Anonymous")}
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    mebi["Peak"] = int(peak.split()[1]) / 1024
    return {"peak": mebi["Peak"], "resident": mebi["Rss"], "proportional": mebi["Pss"], "files": mebi["Pss_File"], "own": mebi["Anonymous"]}


def main(root: str, budget: str, resume_pack: int) -> None:
    from synthetic_index import recipe_of

    from terrace.data.order.fixed import plan_of
    from terrace.data.prepare import load_prepared

    recipe, clock = recipe_of(json.loads(budget)), lambda: np.asarray([time.perf_counter(), time.process_time()])
    batch = recipe.stages[0].batch.packs
    step = resume_pack // batch
    np.zeros(1).sum()
    before = memory()

    begun = clock()
    prepared = load_prepared(root)
    opened = clock()
    plan = plan_of(recipe, 0, prepared)
    first = plan.deal(0, 256)[0]
    places = [prepared.indexes[ref.source].location(ref.row) for pack in first for ref in pack.samples]
    started = clock()

    samples = step * batch * 11  # about so many a pack; any position is one that a checkpoint could hold
    total = -(-len(prepared.indexes["s"]) // 11)
    state = plan.state(0) | {
        "step": step, "pack": step * batch, "window": 7, "window_first_pack": step * batch, "window_position": samples,
        "total_packs": total,
    }  # fmt: skip
    again = clock()
    resumed = plan_of(recipe, 0, load_prepared(root))
    resumed.restore(state)
    steps = resumed.total_steps
    resumed.deal(step, 256)
    there = clock()
    for following in range(step + 1, step + 4):
        resumed.deal(following, 256)
    planned = clock()
    after = memory()
    print(json.dumps({
        "rows": len(prepared.indexes["s"]), "total_steps": steps,
        **{
            what: dict(zip(("wall", "cpu"), np.round(seconds, 3).tolist()))
            for what, seconds in (
                ("open", opened - begun), ("start", started - begun), ("resume", there - again), ("step", (planned - there) / 3),
            )
        },
        "samples_of_a_pack": sum(len(pack.samples) for pack in first) / len(first), "last_row": max(place.row for place in places),
        "mebibytes": {name: round(after[name] - before["resident" if name == "peak" else name], 1) for name in after},
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
