"""A real four-stage curriculum in miniature: drawn data, a quarter of a million parameters, the command itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "tests" / "recipes" / "tiny.yaml"
SOURCES = {
    "captions": "captions",
    "documents": "interleaved",
    "text": "text",
    "instructions": "qa",
    "grounding": "grounding",
}


@pytest.fixture(scope="session")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tiny recipe's sources, drawn once per session."""
    from terrace.demo.corpus import write_corpus

    samples = {"captions": 60, "interleaved": 24, "text": 40, "qa": 40, "grounding": 40}
    folder = write_corpus(tmp_path_factory.mktemp("corpus"), seed=1, samples=samples, workers=1)
    return [f"data.sources.{name}.uri={folder / file}.jsonl" for name, file in SOURCES.items()]


def command(run_dir: Path | str, overrides: list[str], *more: str, recipe: Path = RECIPE) -> list[str]:
    return [sys.executable, "-m", "terrace.cli", "run", str(recipe), "--run-dir", str(run_dir), *overrides, *more]


def environment(**more: str) -> dict[str, str]:
    paths = [str(REPOSITORY / "platform"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def run_to_end(run_dir: Path | str, overrides: list[str], *more: str, recipe: Path = RECIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(run_dir, overrides, *more, recipe=recipe),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=REPOSITORY,
    )


def kill_when(
    run_dir: Path | str, overrides: list[str], due: Callable[[], bool], *more: str, number: int = signal.SIGKILL, recipe: Path = RECIPE
) -> int:
    """Start the run in a process group of its own and signal the whole group as soon as `due()`; the exit status."""
    process = subprocess.Popen(
        command(run_dir, overrides, *more, recipe=recipe), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, cwd=REPOSITORY,
    )  # fmt: skip
    deadline = time.monotonic() + 900
    try:
        while not due():
            assert process.poll() is None, f"the run ended by itself with {process.returncode} before it could be killed"
            assert time.monotonic() < deadline, "the moment to kill the run did not come within 900 s"
            time.sleep(0.005)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        return process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def losses(run_dir: Path) -> dict[str, list[tuple[int, float, int]]]:
    """Per stage its (step, loss, tokens) of every step, from the metrics files."""
    found = {}
    for path in sorted(run_dir.glob("stages/*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().split("\n") if line]
        found[path.parent.name] = [(row["step"], row["loss"], row["tokens"], row["samples"]) for row in rows]
    return found


def final_bytes(run_dir: Path, stage: str) -> dict[str, bytes]:
    """Weight files of a stage's Hugging Face directory."""
    return {path.name: path.read_bytes() for path in sorted((run_dir / "stages" / stage / "final").glob("*.safetensors"))}


def events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "journal.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
