"""The data path beside the loaders people use: samples a second, CPU seconds and memory for the same work, on this machine.

    make bench-data                                    # 4,000 JPEGs, about 15 minutes on two cores
    make bench-data ARGS="--samples 400 --rounds 1"    # a short run
    make bench-data ARGS="--mosaic /tmp/mosaic/bin/python --torchvision DIR"

WebDataset and datasets come with `pip install -c constraints.txt -e '.[bench]'`. MosaicML Streaming needs an environment of its
own (`python3.11 -m venv /tmp/mosaic`, and in it `pip install mosaicml-streaming simplejpeg tokenizers`), the Hugging Face processor with
torchvision a folder that holds it (`pip install --target DIR --no-deps torchvision`). What is not there is said in the table.

Contestants take turns, each round in fresh processes, and the table shows medians, because other people's work on a shared machine
comes and goes. CPU seconds are those of the whole process tree, Ray's own processes and what they reaped included; memory is the
proportional set size of that tree, once a second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
PLATFORM = HERE.parent.parent / "platform"
sys.path.insert(0, str(HERE))
import machine_load  # noqa: E402

CONTESTANTS = ("bare_alone", "bare", "terrace", "webdataset", "datasets", "mosaic", "processor")
MEMORY_SECONDS = 1.0  # looking costs time in proportion to what processes map, and Ray's all map the object store


# ---------------------------------------------------------------- one contestant


@dataclass
class Watch:
    """CPU and memory of a process and everything below it."""

    root: psutil.Process
    memory: list[tuple[float, float]] = field(default_factory=list)  # (when, GB)
    stopped: bool = False

    def processes(self) -> list[psutil.Process]:
        try:
            return [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        total = 0.0
        for process in self.processes():
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def follow(self) -> None:
        """Take the memory until told to stop."""
        while not self.stopped:
            self.memory.append((time.perf_counter(), sum(map(_pss_gb, self.processes()))))
            time.sleep(MEMORY_SECONDS)


def _pss_gb(process: psutil.Process) -> float:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1e6
    except (OSError, ProcessLookupError):
        pass
    return 0.0


def run_contestant(name: str, root: Path, args: argparse.Namespace) -> dict[str, float] | str:
    """Figures of one run, or why there are none."""
    python = args.mosaic if name == "mosaic" else sys.executable
    if python is None:
        return "not installed"
    command = [python, str(HERE / "bench_data_loaders.py"), name, str(root), "--workers", str(args.workers)]
    command += ["--epochs", str(args.epochs if name != "processor" else 1)]
    command += ["--torchvision", args.torchvision] if args.torchvision and name == "processor" else []
    paths = [str(PLATFORM), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=tempfile.gettempdir()
        )
        watch = Watch(psutil.Process(child.pid))
        follower = threading.Thread(target=watch.follow, daemon=True)
        follower.start()
        figures: dict[str, float] = {}
        began = cpu_before = 0.0
        assert child.stdin is not None
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("START"):
                cpu_before, began = watch.cpu_seconds(), time.perf_counter()
            elif line.startswith("END "):
                cpu = watch.cpu_seconds() - cpu_before
                figures = json.loads(line.removeprefix("END ")) | {"cpu_seconds": cpu}
            else:
                continue
            child.stdin.write("\n")
            child.stdin.flush()
        child.wait()
        watch.stopped = True
        follower.join()
        errors.seek(0)
        if not figures:
            return "failed: " + (errors.read().strip().splitlines() or ["it said nothing"])[-1][:200]
    return figures | _memory_figures(watch.memory, began)


def _memory_figures(memory: list[tuple[float, float]], began: float) -> dict[str, float]:
    """Peak of the whole run, start-up included, and of both halves of the measured part: a leak shows as a rise."""
    measured = [amount for when, amount in memory if when >= began]
    half = len(measured) // 2
    return {
        "peak_gb": max(amount for _, amount in memory),
        "first_half_gb": max(measured[:half], default=0.0),
        "second_half_gb": max(measured[half:], default=0.0),
    }


# ---------------------------------------------------------------- index and plan


def index_figures(root: Path) -> dict[str, float]:
    """Samples a second and core: building the index of the tars, and reading the same tars with nothing done."""
    from bench_data_corpus import tar_samples
    from bench_data_loaders import terrace_data

    from terrace.data.index.build import build_index
    from terrace.data.sources.ingest import ingest_source

    recipe, prepared = terrace_data(root)
    source = recipe.data.sources["captions"]
    read, built = [], []
    for _ in range(3):
        begun = time.process_time()
        count = sum(1 for _ in tar_samples(root))
        read.append(count / (time.process_time() - begun))
        with tempfile.TemporaryDirectory() as folder:
            report = ingest_source("captions", source, recipe.data, folder)
            begun = time.process_time()
            build_index("captions", source, report, prepared.tokenizer(), prepared.family, use_ray=False)
            built.append(count / (time.process_time() - begun))
    return {"read_samples_per_second": statistics.median(read), "index_samples_per_second": statistics.median(built)}


def plan_figures(root: Path, epochs: int = 25) -> float:
    """CPU seconds per 1,000 samples of order, packing and dealing, and of looking up where their bytes lie."""
    from bench_data_loaders import terrace_data

    from terrace.data.order.plan import StagePlan
    from terrace.data.stream.rank_stream import rank_tasks
    from terrace.data.stream.tasks import TaskSettings

    recipe, prepared = terrace_data(root)
    stage = recipe.stages[0]
    stage = stage.model_copy(update={"budget": stage.budget.model_copy(update={"epochs": float(epochs)})})
    recipe = recipe.model_copy(update={"stages": [stage]})
    settings = TaskSettings.of(recipe, 0, prepared)
    begun, samples = time.process_time(), 0
    plan = StagePlan.build(recipe, 0, prepared)
    for task in rank_tasks(plan, settings, plan.packs_of_step, 0):
        samples += sum(len(part.spec.samples) for part in task.parts)
    return 1_000 * (time.process_time() - begun) / samples


# ---------------------------------------------------------------- table


def table(results: dict[str, list[dict[str, float] | str]]) -> str:
    """Medians over the rounds, and ratios to the bare loop on all cores."""
    middle: dict[str, dict[str, float]] = {}
    for name, runs in results.items():
        good = [run for run in runs if isinstance(run, dict)]
        if good:
            middle[name] = {key: statistics.median(run[key] for run in good) for key in good[0]}
    bare = middle.get("bare")
    bare_cpu = 1_000 * bare["cpu_seconds"] / bare["samples"] if bare else float("nan")
    lines = [
        "| | samples/s | CPU s per 1,000 | of the bare loop | peak GB | GB first / second half | until the first pack, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        if name not in middle:
            lines.append(f"| {name} | {runs[0]} | | | | | |")
            continue
        found = middle[name]
        cpu = 1_000 * found["cpu_seconds"] / found["samples"]
        lines.append(
            f"| {name} | {found['samples'] / found['seconds']:,.0f} | {cpu:.2f} | {cpu / bare_cpu:.2f} | {found['peak_gb']:.2f} |"
            f" {found['first_half_gb']:.2f} / {found['second_half_gb']:.2f} | {found['first_seconds']:.2f} |"
        )
    return "\n".join([*lines, *_verdicts(middle, bare_cpu)])


def _verdicts(middle: dict[str, dict[str, float]], bare_cpu: float) -> list[str]:
    own = middle.get("terrace")
    if own is None:
        return []
    rate = {name: found["samples"] / found["seconds"] for name, found in middle.items()}
    peers = {name: rate[name] for name in ("webdataset", "datasets", "mosaic") if name in rate}
    lines = ["", f"CPU of terrace over the bare loop: {1_000 * own['cpu_seconds'] / own['samples'] / bare_cpu:.2f} (at most 1.15)"]
    if peers:
        fastest = max(peers, key=lambda name: peers[name])
        lines.append(f"speed over the fastest loader, {fastest}: {rate['terrace'] / peers[fastest]:.2f} (at least 1)")
    if "processor" in rate:
        lines.append(f"speed over the usual processor: {rate['terrace'] / rate['processor']:.1f} (at least 4)")
    return [*lines, f"peak memory: {own['peak_gb']:.2f} GB (at most 3)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=4_000)
    parser.add_argument("--epochs", type=int, default=2, help="measured passes over the samples; one more goes before")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="decode processes of every loader")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "terrace-bench-data", help="keeps the corpus")
    parser.add_argument("--mosaic", help="python of an environment with mosaicml-streaming")
    parser.add_argument("--torchvision", help="folder that holds torchvision")
    parser.add_argument("--only", nargs="+", choices=(*CONTESTANTS, "index", "plan"), help="leave out the others")
    parser.add_argument("--json", type=Path, help="write every run's figures, while going on")
    args = parser.parse_args()

    from bench_data_corpus import make_corpus
    from bench_data_loaders import terrace_data

    root = make_corpus(args.folder, args.samples)
    terrace_data(root)
    facts = json.loads((root / "done.json").read_text())
    print(f"{facts['samples']:,} JPEGs of {facts['mean_jpeg_bytes'] / 1e3:.0f} kB on average, {args.workers} workers, {args.rounds} rounds")
    chosen = [name for name in CONTESTANTS if not args.only or name in args.only]
    results: dict[str, list[Any]] = {name: [] for name in chosen}
    watched = machine_load.Watch()
    for turn in range(args.rounds):
        for name in chosen:
            found = run_contestant(name, root, args)
            results[name].append(found)
            told = found if isinstance(found, str) else f"{found['samples'] / found['seconds']:,.0f} samples/s"
            print(f"round {turn + 1}: {name}: {told}", file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))
    load = watched.end()
    print(f"\n{table(results)}\n{load}\n" if chosen else "")
    if not args.only or "index" in args.only:
        index = index_figures(root)
        print(
            f"index: {index['index_samples_per_second']:,.0f} samples/s per core, of {index['read_samples_per_second']:,.0f} that reading"
            f" the tars allows ({index['index_samples_per_second'] / index['read_samples_per_second']:.2f})"
        )
    if not args.only or "plan" in args.only:
        plan = plan_figures(root)
        bare = next((run for run in results.get("bare", []) if isinstance(run, dict)), None)
        share = f", {plan / (1_000 * bare['cpu_seconds'] / bare['samples']):.2%} of decoding" if bare else ""
        print(f"order and packing: {1_000 * plan:.1f} CPU ms per 1,000 samples{share}")


if __name__ == "__main__":
    main()
