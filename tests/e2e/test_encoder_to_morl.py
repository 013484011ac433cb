"""Eight kinds of stage over three classes of model by the command itself, killed in three of them: the same bits as uninterrupted."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from e2e_runs import REPOSITORY, final_bytes, kill_when, losses, run_to_end

from terrace.demo.corpus import write_corpus

RECIPE = REPOSITORY / "jobs" / "recipes" / "demo-encoder-to-morl.yaml"
STAGES = ("mae", "clip", "projector-warmup", "alignment", "multimodal", "dpo", "reward-model", "morl")
SOURCES = {"captions": 200, "grounding": 60, "qa": 60, "counting": 60, "pairs": 90, "rl/counting": 60}
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]


def changes(folder: Path) -> list[str]:
    """The shipped recipe on fewer rows and steps."""
    return [
        *(f"data.sources.{name.replace('/', '-')}.uri={folder / name}.jsonl" for name in SOURCES),
        *(f"data.sources.{name.replace('/', '-')}.holdout_samples=8" for name in SOURCES),
        *(f"stages.{name}.evaluate.max_samples_per_kind=4" for name in STAGES),
        *(f"stages.{name}.{change}" for name in STAGES[:-1] for change in ("budget.steps=12", "checkpoint.every_steps=3")),
        *(f"stages.{name}.batch.samples_per_pack=16" for name in ("mae", "clip")),
        *(f"stages.{name}.batch.packs=4" for name in ("dpo", "reward-model")),
        "stages.morl.budget.steps=4", "stages.morl.checkpoint.every_steps=1", "stages.morl.grpo.prompts_per_iteration=4",
        "stages.morl.grpo.samples_per_prompt=4", "tokenizer.train_vocabulary_size=512",
    ]  # fmt: skip


def test_killed_in_three_stages_it_ends_with_the_same_weights(tmp_path):
    """In the encoder's, while the compared model trains, and between two iterations of reinforcement learning."""
    overrides = changes(write_corpus(tmp_path / "corpus", samples=SOURCES, workers=2))
    ended = run_to_end(tmp_path / "whole", overrides, recipe=RECIPE)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    killed = tmp_path / "killed"
    for number, steps in ((1, 5), (6, 5), (8, 2)):
        metrics = killed / "stages" / f"{number:02d}-{STAGES[number - 1]}" / "metrics.jsonl"

        def due(metrics: Path = metrics, steps: int = steps) -> bool:
            return metrics.exists() and len(metrics.read_bytes().splitlines()) >= steps

        assert kill_when(killed, overrides, due, recipe=RECIPE) == -signal.SIGKILL
    ended = run_to_end(killed, overrides, recipe=RECIPE)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert losses(killed) == losses(tmp_path / "whole")
    for number, name in enumerate(STAGES, 1):
        folder = f"{number:02d}-{name}"
        assert final_bytes(killed, folder) == final_bytes(tmp_path / "whole", folder), folder
