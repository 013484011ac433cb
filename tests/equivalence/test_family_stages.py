"""Every family through a curriculum of its own: two lm stages, a reward model, MORL and a comparison, stopped, resumed, exported, asked."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONFIGS, NAMES, PIXELS, QUICK, recipe_model
from PIL import Image

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import prepare_data
from terrace.errors import Preempted
from terrace.evaluate.replies import Settings
from terrace.evaluate.run import evaluate_model, read_results
from terrace.families.registry import family_class
from terrace.recipe.schema import PARTS, Recipe
from terrace.worker.context import WorkerContext

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


def write_rows(folder: Path, count: int = 18) -> None:
    """Captions, questions with a box, prompts with a task, and preferences, over pictures of one colour each."""
    rng = np.random.default_rng(1)
    rows: dict[str, list[dict[str, Any]]] = {"captions": [], "questions": [], "prompts": [], "pairs": []}
    for number in range(count):
        name, colour = list(COLOURS.items())[number % 3]
        size = (int(rng.integers(40, 120)), int(rng.integers(40, 120)))
        Image.fromarray(np.full((size[1], size[0], 3), colour, np.uint8)).save(folder / f"{number}.png")
        picture = {"images": [f"{number}.png"]}
        rows["captions"].append({"image": f"{number}.png", "caption": f"A picture in {name}."})
        ask = {"role": "user", "content": "<image>Which colour, and where?"}
        answer = {"role": "assistant", "content": f"{name} at <bbox>"}
        box = {"objects": {"bbox": [[2, 3, size[0] - 5, size[1] - 4]]}}
        rows["questions"].append({"messages": [ask, answer], **picture, **box})
        task = {"task": "digits", "solution": str(number)}
        rows["prompts"].append({"messages": [{"role": "user", "content": f"<image>Digits: 0123456789 {number}"}], **picture, **task})
        turns = [{"role": "user", "content": "<image>Which colour?"}, {"role": "assistant", "content": name}]
        rows["pairs"].append({"messages": turns, "rejected_response": "purple", **picture})
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def recipe_of(name: str, folder: Path) -> Recipe:
    low, high = PIXELS.get(name, (784, 12_544))
    common = {
        "sequence_length": 512, "precision": "fp32", "batch": {"packs": 2}, "pixels": {"min": low, "max": high},
        "checkpoint": {"every_steps": 1}, "schedule": {"kind": "constant", "warmup": 0}, "loss_chunk_tokens": 64,
        "data_loading": {"engine": "inline", "window_samples": 32}, "evaluate": {"max_samples_per_kind": 2},
    }  # fmt: skip
    everything = {part: {"lr": 1e-3} for part in (PARTS if name == "toy" else family_class(name).trainable())}
    everything.get("vision", {})["layer_decay"] = 0.9
    first = {"projector" if "projector" in everything else "language": {"lr": 1e-2}}
    grpo = {"prompts_per_iteration": 2, "samples_per_prompt": 3, "max_response_tokens": 8, "max_sampling_rounds": 1}
    kinds = {"captions": "caption", "questions": "grounding", "prompts": "prompt", "pairs": "preference"}
    sources = {
        source: {"uri": str(folder / f"{source}.jsonl"), "kind": kind, "holdout_samples": 3} for source, kind in kinds.items()
    }
    sources["prompts"]["task"] = "digits"
    rewards = {"digits": [{"name": "rl_rules:share_of_digits"}]}
    return Recipe.model_validate({
        "name": f"tiny-{name}", "model": TOY if name == "toy" else recipe_model(name), "data": {"sources": sources},
        "tokenizer": {"train_vocabulary_size": 400},
        "stages": [
            {"name": "warm", "train": first, "mixture": {"weights": {"captions": 1.0}}, "budget": {"steps": 2}, **common},
            {"name": "all", "train": everything, "mixture": {"weights": {"captions": 1.0, "questions": 1.0}}, "budget": {"steps": 4},
             **common},
            {"name": "judge", "objective": "reward_model", "start_from": "all", "train": everything,
             "mixture": {"weights": {"pairs": 1.0}}, "budget": {"steps": 2}, **common},
            {"name": "morl", "objective": "grpo", "start_from": "all", "train": {"language": {"lr": 1e-3}}, "rewards": rewards,
             "grpo": grpo, "mixture": {"weights": {"prompts": 1.0}}, "budget": {"steps": 2}, **common},
            {"name": "compare", "objective": "mpo", "start_from": "all", "train": everything,
             "mixture": {"weights": {"pairs": 1.0}}, "budget": {"steps": 2}, **common},
        ],
    })  # fmt: skip


def weights_of(run_dir: Path, stage: str) -> str:
    [file] = sorted((run_dir / "stages" / stage / "final").glob("*.safetensors"))
    return hashlib.sha256(file.read_bytes()).hexdigest()


TOY = {
    "architecture": "extensions.toy_family",
    "config": {**CONFIGS["llava"], "vision_config": {**CONFIGS["llava"]["vision_config"], "image_size": 28}},
}


def test_an_own_family_is_one_module_of_less_than_60_lines():
    """The same run as the built-in families, below, by `model.architecture: extensions.toy_family` and nothing else."""
    module = Path(__file__).resolve().parents[1] / "extensions" / "toy_family.py"
    code = [line for line in module.read_text().splitlines() if line.strip() and not line.startswith(("from ", "import "))]
    assert len(code) < 60


@pytest.mark.parametrize("name", [*(name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES), "toy"])
def test_a_family_trains_resumes_evaluates_and_exports(name, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    write_rows(tmp_path)
    recipe = recipe_of(name, tmp_path)
    run_dir = tmp_path / "run"
    prepare_data(recipe, run_dir, use_ray=False)
    results = [run_stage(recipe, number, run_dir, 1, WorkerContext()) for number in range(5)]
    caption = results[1].evaluation
    assert caption["after"]["caption"] < caption["before"]["caption"]
    assert set(caption["after"]) == {"caption", "grounding"}
    assert results[2].evaluation["after"]["preference/loss"] > 0
    assert results[3].steps == 2
    assert results[4].evaluation["after"]["preference/margin"] > 0
    # Stopped after one step of the second stage, by a copy of the run as it stood before, it ends with the same bits.
    again = tmp_path / "again"
    shutil.copytree(run_dir, again, ignore=shutil.ignore_patterns("0[2-5]-*"))
    asked = iter(range(100))
    with pytest.raises(Preempted):
        run_stage(recipe, 1, again, 1, WorkerContext(should_stop=lambda: "told" if next(asked) >= 1 else None))
    run_stage(recipe, 1, again, 2, WorkerContext())
    assert weights_of(again, "02-all") == weights_of(run_dir, "02-all")
    # The exported model is asked: held-out samples their loss, and pictures their answers.
    final = run_dir / "stages" / "02-all" / "final"
    how = Settings(device="cpu", limit=3, max_new_tokens=6)
    scores = evaluate_model(final, [f"loss:{run_dir}", f"counting:{tmp_path}/prompts.jsonl"], tmp_path / "scores", how)
    assert all(suite["scores"] for suite in scores["suites"].values())
    _, rows = read_results(tmp_path / "scores")
    assert [row.answer_tokens > 0 for row in rows if row.suite.startswith("counting")] == [True] * 3
