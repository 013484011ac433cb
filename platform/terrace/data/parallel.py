"""Many units of work, in a plain loop or on a Ray cluster, with the same function either way.

Starting Ray tasks costs more than a few hundred megabytes of ingest, so small inputs stay in this process. On a cluster the units are
the rows of a Ray Data job: bounded in flight, retried when a node dies, one CPU each. A unit's function must leave its results on
storage under a name of its own (that is what makes a restart cheap) and return a small value.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]  # (what, done, total), for example ("ingest captions", 12, 40)
RAY_FROM_COST = 512 * 2**20  # bytes of raw input (images not counted) or of shards, from which a cluster pays off


def run_units(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    costs: Sequence[int],
    use_ray: bool | None = None,
    local_work: Callable[[Item], Result] | None = None,
) -> Iterator[tuple[int, Result]]:
    """(number of the item, result) as they finish. `use_ray`: None decides by whether Ray runs here and the work is worth it.

    `local_work` takes the place of `work` in this process (the same work, with something that cannot travel, like a progress bar).
    """
    if use_ray is None:
        use_ray = len(items) > 1 and sum(costs) >= RAY_FROM_COST and ray_is_running()
    if not use_ray:
        for number, item in enumerate(items):
            yield number, (local_work or work)(item)
        return
    import ray

    # What is unpickled here, this process or its own worker has pickled.
    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "result": pickle.dumps(work(pickle.loads(row["item"])))}  # noqa: S301

    rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run, num_cpus=1)
    for row in dataset.iter_rows():
        yield int(row["number"]), pickle.loads(row["result"])  # noqa: S301


def ray_is_running() -> bool:
    """Whether this process already belongs to a Ray cluster (Ray is never started, or even imported, here)."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
