"""`python jobs/reinforce.py` over real prompts of five tasks: drawn, decoded, scored, and left as a stage's result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_runs import REPOSITORY, environment

pytestmark = [pytest.mark.slow, pytest.mark.ray]
TASKS = {"counting", "grounding", "gui_point", "visual_reasoning", "text_reasoning"}
FEW = [f"data.sources.{name}.max_samples=40" for name in ("counting", "grounding", "gui", "visual-math", "text-math")]


def reinforce(run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    recipe = REPOSITORY / "jobs" / "recipes" / "five-tasks-morl.yaml"
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "jobs" / "reinforce.py"), str(recipe), "--run-dir", str(run_dir), *more],
        env=environment(), capture_output=True, text=True, timeout=540, cwd=REPOSITORY, check=False,
    )  # fmt: skip


def test_five_tasks_of_real_prompts_run_to_the_end(shared_data: Path, tmp_path: Path):
    done = reinforce(
        tmp_path / "run", "--prompts", str(shared_data / "rl"), "--images-root", str(shared_data), *FEW,
        "stages.morl.budget.steps=2", "stages.morl.grpo.samples_per_prompt=4", "stages.morl.grpo.max_response_tokens=16",
        "stages.morl.evaluate.max_samples_per_kind=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "run" / "stages" / "01-morl"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n") if line]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row["tasks"]) == TASKS
        assert all(figures["reward_failures"] == 0 for figures in row["tasks"].values())
    result = json.loads((folder / "result.json").read_text())
    assert set(result["evaluation"]["after"]) == {f"{how}/{task}" for how in ("reward", "greedy_reward") for task in TASKS}
    assert (folder / "final" / "config.json").is_file()


def test_a_folder_without_the_files_is_named(tmp_path: Path):
    done = reinforce(tmp_path / "run", "--prompts", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
