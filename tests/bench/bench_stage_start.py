"""How long after a stage's last step the next stage takes its first, and where that time goes.

    python tests/bench/bench_stage_start.py [--workers 1 2] [--launchers local process] [--write TABLE.md]

The tiny recipe's four stages are run by the command; what its files say is looked at a hundred times a second. Each row is the median of
the three changes from a stage to the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "e2e")]

from e2e_runs import RECIPE, REPOSITORY, SOURCES, environment  # noqa: E402
from machine_load import Watch  # noqa: E402

STAGES = ("01-projector-warmup", "02-alignment", "03-pretraining", "04-long-context")
SAMPLES = {"captions": 60, "interleaved": 24, "text": 40, "qa": 40, "grounding": 40}
# What is there when a part is over, in a stage's folder; the first belongs to the stage before.
PARTS = {
    "evaluation, export and result of the stage before": "result.json",
    "the controller notices and launches": "attempt.json",
    "Ray starts the workers": "attempts/001/alive-0000.json",
    "index, plan and model": "plan.json",
    "evaluation before, first pack and first step": "metrics.jsonl",
}


def changes(run: Path, process: subprocess.Popen) -> list[dict[str, float]]:
    """Of each change between two stages: seconds of its parts, and in all. Watches until the process ends."""
    first: dict[Path, float] = {}  # when a file was first there
    last: dict[Path, tuple[int, float]] = {}  # how long a metrics file is, and since when
    while process.poll() is None:
        now = time.monotonic()
        for stage in STAGES:
            for name in PARTS.values():
                path = run / "stages" / stage / name
                size = length(path)
                if size:
                    first.setdefault(path, now)
                if name == "metrics.jsonl" and size != last.get(path, (0, 0))[0]:
                    last[path] = (size, now)
        time.sleep(0.01)
    found = []
    for before, after in itertools.pairwise(STAGES):
        begun = at = last[run / "stages" / before / "metrics.jsonl"][1]
        seconds = {}
        for number, (part, name) in enumerate(PARTS.items()):
            until = first[run / "stages" / (after if number else before) / name]
            seconds[part], at = until - at, until
        found.append(seconds | {"in all": at - begun})
    return found


def length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def measured(folder: Path, corpus: Path, launcher: str, workers: int) -> list[dict[str, float]]:
    run = folder / f"{launcher}-{workers}"
    words = [f"data.sources.{name}.uri={corpus / file}.jsonl" for name, file in SOURCES.items()]
    words += [f"stages.{stage[3:]}.resources.workers={workers}" for stage in STAGES]
    command = [sys.executable, "-m", "terrace.cli", "run", str(RECIPE), "--run-dir", str(run), "--launcher", launcher, *words]
    with open(folder / f"{run.name}.log", "wb") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, cwd=REPOSITORY)
        try:
            found = changes(run, process)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise SystemExit((folder / f"{run.name}.log").read_text(errors="replace")[-3000:])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--launchers", nargs="+", default=["local", "process"])
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    from terrace.demo.corpus import write_corpus

    columns: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="terrace-starts-") as folder:
        corpus = write_corpus(Path(folder) / "corpus", seed=1, samples=SAMPLES, workers=1)
        watch = Watch()
        for launcher in options.launchers:
            for workers in options.workers:
                columns[f"{launcher}, {workers} workers"] = measured(Path(folder), corpus, launcher, workers)
        load = watch.end()
    rows = ["| seconds | " + " | ".join(columns) + " |", "|" + "---|" * (1 + len(columns))]
    for part in (*PARTS, "in all"):
        rows.append(f"| {part} | " + " | ".join(f"{median(one[part] for one in found):.1f}" for found in columns.values()) + " |")
    print("\n".join(rows) + f"\n\n{load}")
    print(json.dumps(columns))
    if options.write:
        if not load.quiet:
            raise SystemExit(f"not written: {load}")
        options.write.write_text("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
