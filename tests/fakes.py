"""Stands in for training in tests of the control side: a stage that counts, checkpoints, stops and fails on demand."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from terrace.cluster.attempt_files import write_atomic
from terrace.errors import InputError, Preempted
from terrace.recipe.loading import parse_recipe
from terrace.recipe.schema import Recipe
from terrace.storage.run_layout import stage_directory


def tiny_recipe(stages: int = 2, steps: int = 4, **stage_keys: Any) -> Recipe:
    """A valid recipe that trains nothing real: for the control side only."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
              "fullatt_block_indexes": [1]}  # fmt: skip
    base = {
        "objective": "lm", "train": {"projector": {"lr": 1e-3}}, "mixture": {"captions": 1.0}, "sequence_length": 256,
        "pixels": {"min": 784, "max": 12544}, "budget": {"steps": steps}, "batch": {"packs": 2}, "precision": "fp32",
        "checkpoint": {"every_steps": 2}, "failure": {"backoff_seconds": 0.1, "max_restarts": 2},
    }  # fmt: skip
    return parse_recipe({
        "name": "tiny",
        "model": {"config": {"text_config": text, "vision_config": vision}},
        "tokenizer": {"train_vocabulary_size": 512},
        "data": {"sources": {"captions": {"uri": "captions.jsonl", "holdout_samples": 2}}},
        "stages": [{"name": f"stage-{letter}", **base, **stage_keys} for letter in "abcdefgh"[:stages]],
    })  # fmt: skip


def fake_stage(
    recipe: Recipe, stage_index: int, run_dir: Path, attempt: int, *, rank: int, world_size: int, local_rank: int,
    device: str, report: Any, should_stop: Any,
) -> None:  # fmt: skip
    """Counts to the budget, one step per TERRACE_FAKE_STEP_SECONDS; every step is a checkpoint.

    A file `fail-<stage>-<attempt>` in the run directory makes that attempt raise what the file says; a file
    `hold-<stage>` makes it wait, listening, before the step that the file names.
    """
    stage = recipe.stages[stage_index]
    folder = stage_directory(run_dir, stage_index, stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    order, hold = Path(run_dir) / f"fail-{stage.name}-{attempt}", Path(run_dir) / f"hold-{stage.name}"
    metrics = folder / "metrics.jsonl"
    done = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    for step in range(done + 1, stage.budget.steps + 1):
        while hold.exists() and int(hold.read_text() or 0) <= step and not should_stop():
            time.sleep(0.05)
        if reason := should_stop():
            raise Preempted(f"stopped at step {step - 1} ({reason})")
        if order.exists():
            what = order.read_text()
            if what == "die":
                os._exit(7)
            if what == "hang":
                time.sleep(3600)
            raise {"input": InputError, "program": RuntimeError}[what](f"told to fail at step {step}")
        time.sleep(float(os.environ.get("TERRACE_FAKE_STEP_SECONDS", "0.05")))
        if rank == 0:
            row = {"step": step, "loss": 1.0 / step, "tokens": 100, "samples": 3, "supervised_tokens": 50,
                   "tokens_per_second": 10.0, "time": time.time(), "learning_rate": {"projector": 1e-3},
                   "step_seconds": 0.05, "data_wait_seconds": 0.01, "grad_norm": 1.0, "pack_fill": 0.9}  # fmt: skip
            with open(metrics, "a") as file:
                file.write(json.dumps(row) + "\n")
            (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
        report({"step": step}, None)
    if rank == 0:
        (folder / "final").mkdir(exist_ok=True)
        evaluation = {"before": {"caption": 2.0}, "after": {"caption": 1.0 / stage.budget.steps}}
        result = {"steps": stage.budget.steps, "loss": 0.25, "evaluation": evaluation, "attempt": attempt}
        write_atomic(folder / "result.json", json.dumps(result))


def main() -> int:
    """What a job runs in place of `terrace run --stage --attempt`: the same single attempt, with the counting stage."""
    import argparse

    from fakes import fake_stage as stage_function

    from terrace.cluster.local import LocalLauncher
    from terrace.curriculum.single import run_single_attempt
    from terrace.recipe.loading import load_recipe

    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--stage")
    parser.add_argument("--attempt", type=int)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe)
    launcher = LocalLauncher(recipe, stage_function)
    return run_single_attempt(recipe, given.run_dir, given.stage, given.attempt, prepare=lambda *_: {}, launcher=launcher)


if __name__ == "__main__":
    raise SystemExit(main())
