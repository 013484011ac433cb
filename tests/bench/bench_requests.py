"""Requests a minute that a run on S3 costs while nothing changes, and while its stage trains, counted in front of a real object store.

    python tests/bench/bench_requests.py [--seconds 60] [--followers 1x1 1x8 4x8] [--no-training]

Prints a table by kind of request. Followers are processes that follow a run and do nothing else, so many machines (a cache folder of its
own each) times so many ranks; the run is `terrace run` on two workers, whose steps have nothing to do with the storage, counted between
two checkpoints.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "chaos")]

import chaos  # noqa: E402
import storage_chaos  # noqa: E402
import yaml  # noqa: E402

from terrace.storage.files import write_file  # noqa: E402

STEPS = 100_000


def kind(method: str, path: str) -> str:
    """What a request is for, and so what it costs: a listing is billed as a write."""
    if method == "GET" and path.count("/") == 1:
        return "lists"
    return {"PUT": "writes", "POST": "writes", "DELETE": "deletes"}.get(method, "reads")


def counted(bench: storage_chaos.Bench, seconds: float, settle: float) -> dict[str, float]:
    """Requests a minute by kind over so many seconds, after it has settled."""
    time.sleep(settle)
    begun, first = time.monotonic(), len(bench.server.requests)
    time.sleep(seconds)
    found = collections.Counter(kind(method, path) for method, path, _ in bench.server.requests[first:])
    minutes = (time.monotonic() - begun) / 60
    return {name: round(count / minutes, 1) for name, count in found.items()}


FOLLOW = """
import sys
from terrace.storage import mirror
here = mirror.open_run(sys.argv[1], admitted=True)
with mirror.following(here):
    print("following", flush=True)
    sys.stdin.read()
"""


def followers(bench: storage_chaos.Bench, seconds: float, machines: int, ranks: int) -> dict[str, float]:
    """Of one run that so many processes follow, where nothing changes."""
    place = f"s3://{storage_chaos.BUCKET}/followed-{machines}x{ranks}"
    write_file(f"{place}/recipe.yaml", b"name: followed\n")
    with contextlib.ExitStack() as stack:
        running = []
        for number in range(machines * ranks):
            environment = os.environ | {"XDG_CACHE_HOME": str(bench.folder / f"follower-{machines}x{ranks}-{number // ranks}")}
            command = [sys.executable, "-c", FOLLOW, place]
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            running.append(process)
            stack.callback(process.wait)
            stack.callback(process.kill)
        for process in running:
            if process.stdout.readline().strip() != "following":
                raise SystemExit("a follower ended")
        return counted(bench, seconds, 30.0)


def training(bench: storage_chaos.Bench, seconds: float) -> dict[str, dict[str, float]]:
    path = bench.folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"][0] |= {"budget": {"steps": STEPS}, "checkpoint": {}}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    place, machine = f"s3://{storage_chaos.BUCKET}/trained", "requests"
    process = bench.start(place, machine)
    disk = bench.disk(place, machine)
    try:
        if not chaos.wait_until(lambda: chaos.steps_done(disk) > 5, process):
            raise SystemExit(f"the run ended; see {bench.folder}/log.txt")
        found = counted(bench, seconds, 30.0)
        rate = chaos.steps_done(disk)
        time.sleep(10)
        rate = (chaos.steps_done(disk) - rate) / 10
        return {f"a run whose stage trains on two workers of this machine ({rate:.0f} steps a second)": found}
    finally:
        chaos.send(chaos.family(process), chaos.signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--followers", nargs="+", default=["1x1", "1x8", "4x8"], help="MACHINESxRANKS")
    parser.add_argument("--no-training", action="store_true", help="leave out the run")
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="terrace-requests-") as folder, storage_chaos.store_bench(Path(folder)) as bench:
        for given in options.followers:
            machines, ranks = map(int, given.split("x"))
            rows[f"nothing changes, {machines} x {ranks} processes follow"] = followers(bench, options.seconds, machines, ranks)
        if not options.no_training:
            rows |= training(bench, options.seconds)
    print("| requests a minute | lists | reads | writes | deletes | in all |\n|" + "---|" * 6)
    for name, found in rows.items():
        counts = [f"{found.get(one, 0):.0f}" for one in ("lists", "reads", "writes", "deletes")]
        print(f"| {name} | {' | '.join(counts)} | {sum(found.values()):.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
