"""Four real stages with the run on S3: killed, its machine lost, and finished by another machine with an empty disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from e2e_runs import environment, final_bytes, kill_when, losses, run_to_end
from stored_run import BUCKET, Machines

from terrace.storage.conditional import list_objects, read_versioned
from terrace.storage.mirror import local_folder

STAGES = ["01-projector-warmup", "02-alignment", "03-pretraining", "04-long-context"]
INLINE = [f"stages.{stage[3:]}.data_loading.engine=inline" for stage in STAGES]
RUN = f"s3://{BUCKET}/whole-run"
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]


def use(machines: Machines, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands from here on run on that machine; where it keeps the run."""
    for key, value in machines.environment(name).items():
        monkeypatch.setenv(key, value)
    return local_folder(RUN)


def status() -> dict:
    words = [sys.executable, "-m", "terrace.cli", "status", RUN, "--json"]
    return json.loads(subprocess.check_output(words, env=environment(), text=True))


def stored_bytes(stage: str) -> dict[str, bytes]:
    prefix = f"{RUN}/stages/{stage}/final"
    return {entry.name: read_versioned(f"{prefix}/{entry.name}")[0] for entry in list_objects(prefix) if entry.name.endswith("safetensors")}


def test_a_lost_machine_costs_nothing_that_was_complete(
    machines: Machines, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reference = tmp_path / "reference"
    ended = run_to_end(reference, overrides, *INLINE)
    assert ended.returncode == 0, ended.stderr + ended.stdout

    first = use(machines, "first", monkeypatch)

    def in_the_second_stage() -> bool:
        metrics = first / "stages" / STAGES[1] / "metrics.jsonl"
        return metrics.exists() and len(metrics.read_bytes().splitlines()) >= 3

    assert kill_when(RUN, overrides, in_the_second_stage, *INLINE) == -signal.SIGKILL
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)  # a worker may be dying in it still

    use(machines, "watcher", monkeypatch)
    seen = status()
    assert (seen["run_dir"], seen["stages"][0]["phase"]) == (RUN, "completed")
    assert seen["stages"][1]["phase"] in ("running", "stopped"), "until the killed machine's lease has run out, or after it"
    assert seen["stages"][0]["final"] == f"{RUN}/stages/{STAGES[0]}/final"
    assert seen["stages"][0]["checkpoints"] == ["step-000002", "step-000004"]

    second = use(machines, "second", monkeypatch)
    ended = run_to_end(RUN, overrides, *INLINE)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert f"{RUN}/stages/{STAGES[3]}/final" in ended.stdout
    assert losses(second) == losses(reference)
    for stage in STAGES:
        assert stored_bytes(stage) == final_bytes(reference, stage), f"{stage}: the final weights are equal bit for bit"
    assert not list(second.glob("stages/*/checkpoints/step-*/weights*")), "the disk keeps no checkpoint"

    use(machines, "third", monkeypatch)
    again = run_to_end(RUN, overrides, *INLINE)
    assert again.returncode == 0
    assert f"{RUN}: this run is complete" in again.stdout
