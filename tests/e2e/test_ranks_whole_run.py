"""Four real stages under torchrun, without Ray: the losses and weights of the same recipe under Ray."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from e2e_runs import RECIPE, REPOSITORY, environment, events, final_bytes, losses, run_to_end

STAGES = ["01-projector-warmup", "02-alignment", "03-pretraining", "04-long-context"]
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]


def test_torchrun_trains_what_ray_trains(tmp_path: Path, overrides: list[str]):
    two = [f"stages.{stage[3:]}.resources.workers=2" for stage in STAGES]
    assert run_to_end(tmp_path / "ray", overrides, *two).returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "terrace.cli", "run"]
    command = [*torchrun, str(RECIPE), "--run-dir", str(tmp_path / "ranks"), *overrides, *two]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1500, cwd=REPOSITORY)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert len(re.findall(r"all 4 stages are complete", ended.stdout)) == 1, "one process speaks"
    assert {event["launcher"] for event in events(tmp_path / "ranks") if "launcher" in event} == {"ranks"}
    assert "stage_attempt_failed" not in {event["event"] for event in events(tmp_path / "ranks")}
    assert losses(tmp_path / "ranks") == losses(tmp_path / "ray")
    for stage in STAGES:
        assert final_bytes(tmp_path / "ranks", stage) == final_bytes(tmp_path / "ray", stage), stage
