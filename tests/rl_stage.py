"""A tiny on-policy stage for tests: two tasks on made prompts, rewards that a tiny model can raise, and killing points."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packs import tiny_model
from PIL import Image

from terrace.curriculum.attempt_worker import complete_stage
from terrace.data.prepare import load_prepared, prepare_data
from terrace.generation.native import NativeEngine
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Recipe
from terrace.rl.collect import Collector
from terrace.rl.objective import Grpo
from terrace.train.finish import StageResult
from terrace.worker.context import WorkerContext


def write_prompts(folder: Path, count: int = 24) -> None:
    """JSON Lines of two tasks: `digits` with an image each, `capitals` without."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    digits, capitals = [], []
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (40 + number, 60, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turn = {
            "role": "user",
            "content": f"<image>Write digits, number {number}: 0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        }
        digits.append({"messages": [turn], "images": [f"{number}.png"], "task": "digits", "solution": str(number)})
        turn = {"role": "user", "content": f"Write CAPITALS for {'xyz'[number % 3]} {number}"}
        capitals.append({"messages": [turn], "task": "capitals", "solution": "-"})
    for name, rows in (("digits", digits), ("capitals", capitals)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rl_recipe(folder: Path, steps: int = 3, grpo: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    """A recipe of one grpo stage over the prompts in `folder`."""
    model = tiny_model()
    for key in [key for key in model["config"] if key.endswith("_token_id")]:
        model["config"].pop(key)
    for key in ("vocab_size", "eos_token_id", "bos_token_id"):
        model["config"]["text_config"].pop(key)
    sources = {
        name: {"uri": str(folder / f"{name}.jsonl"), "kind": "prompt", "task": name, "holdout_samples": 4}
        for name in ("digits", "capitals")
    }
    options = {
        "prompts_per_iteration": 4, "samples_per_prompt": 6, "max_response_tokens": 12, "max_sampling_rounds": 2,
        **(grpo or {}),
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": "morl", "objective": "grpo", "train": {"language": {"lr": 3e-3}}, "sequence_length": 256,
        "mixture": {"weights": {"digits": 1.0, "capitals": 1.0}}, "pixels": {"min": 784, "max": 6272},
        "budget": {"steps": steps}, "precision": "fp32", "schedule": {"kind": "constant", "warmup": 0},
        "checkpoint": {"every_steps": 1}, "loss_chunk_tokens": 64, "grpo": options, "evaluate": {"max_samples_per_kind": 4},
        "rewards": {"digits": [{"name": "rl_rules:share_of_digits"}], "capitals": [{"name": "rl_rules:share_of_capitals"}]},
    }  # fmt: skip
    return Recipe.model_validate({
        "name": "tiny-rl", "model": model, "tokenizer": {"train_vocabulary_size": 400}, "data": {"sources": sources},
        "stages": [{**values, **stage}],
    })  # fmt: skip


def write_pairs(folder: Path, count: int = 40) -> None:
    """JSON Lines of preference rows: a kind answer before a rude one, every second row with an image."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        image = "<image>" * (number % 2)
        rows.append({
            "messages": [
                {"role": "user", "content": f"{image}Say something nice, number {number}"},
                {"role": "assistant", "content": "thank you " * int(rng.integers(1, 4))},
            ],
            "rejected_response": "go away " * int(rng.integers(1, 4)),
        })  # fmt: skip
        if image:
            Image.fromarray(rng.integers(0, 255, (40 + number, 60, 3), dtype=np.uint8)).save(folder / f"{number}.png")
            rows[-1]["images"] = [f"{number}.png"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair_recipe(folder: Path, steps: int = 12, **stage: Any) -> Recipe:
    """A recipe of one reward_model stage over the pairs in `folder`."""
    values = rl_recipe(folder).model_dump(mode="json")
    values["data"]["sources"] = {"pairs": {"uri": str(folder / "pairs.jsonl"), "kind": "preference", "holdout_samples": 8}}
    values["stages"][0] |= {
        "objective": "reward_model", "grpo": None, "rewards": {}, "mixture": {"weights": {"pairs": 1.0}},
        "budget": {"steps": steps}, "batch": {"packs": 8}, **stage,
    }  # fmt: skip
    return Recipe.model_validate(values)


def prepare(folder: Path, recipe: Recipe) -> None:
    """Ingest and index the prompts into `folder` without Ray."""
    write_prompts(folder)
    prepare_data(recipe, folder, use_ray=False)


def run(recipe: Recipe, folder: Path, name: str, rank: int = 0, world_size: int = 1, **context: Any) -> StageResult:
    """Run the stage in `<folder>/<name>` on the data prepared in `folder`."""
    torch.set_num_threads(
        int(os.environ.get("TERRACE_TEST_THREADS", 1))
    )  # the same sums in every run, whatever the fixture's scope
    stage_dir = folder / name
    stage_dir.mkdir(parents=True, exist_ok=True)
    surroundings = WorkerContext(rank=rank, world_size=world_size, local_rank=rank, **context)
    prepared = load_prepared(folder / "data")
    feed = importlib.import_module(OBJECTIVES[recipe.stages[0].objective].feed)
    return complete_stage(recipe, 0, lambda: feed.open_feed(recipe, 0, prepared, surroundings), stage_dir, None, surroundings)


def run_rank(rank: int, world_size: int, recipe_values: dict[str, Any], folder: str, name: str) -> None:
    """One of several processes."""
    run(Recipe.model_validate(recipe_values), Path(folder), name, rank, world_size)


def run_rank_breaking(rank: int, world_size: int, recipe_values: dict[str, Any], folder: str, name: str) -> None:
    """The same, broken in the update of iteration 1 on every rank."""

    def fail() -> None:
        raise RuntimeError("broken in the update")

    break_at("update", 1, fail, call=1)
    run_rank(rank, world_size, recipe_values, folder, name)


def run_stopping(*arguments: Any, **keywords: Any) -> Any:
    """`run` or `run_rank` with a model that ends its answers early: every third token is an end of a turn."""
    from terrace.generation import engines

    plain, engines.stop_tokens = engines.stop_tokens, lambda tokenizer, config: tuple(range(0, 400, 3))
    try:
        return (run_rank if isinstance(arguments[0], int) else run)(*arguments, **keywords)
    finally:
        engines.stop_tokens = plain


def figures_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what measures time."""
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k and "per_second" not in k} for line in lines]


# ---------------------------------------------------------------- killing points


def break_at(where: str, iteration: int | None, action: Callable[[], None], call: int = 2) -> Callable[[], None]:
    """Run `action` in the middle of rollout, reward or update of an iteration (from 0; None: of all), at the `call`-th call of what is
    broken. Returns how to undo it."""
    targets = {
        "rollout": (NativeEngine, "_decode"),
        "reward": (Collector, "_submit"),
        "update": (Grpo, "_plain_batch"),
    }
    owner, method = targets[where]
    original, iterate = getattr(owner, method), Grpo._iteration
    reached = {"iteration": -1, "calls": 0}

    def counted(self: Any, number: int) -> Any:
        if iteration is not None:
            reached.update(iteration=number, calls=0)
        return iterate(self, number)

    def breaking(*arguments: Any, **keywords: Any) -> Any:
        if iteration is None or reached["iteration"] == iteration:
            reached["calls"] += 1
            if reached["calls"] == call:
                action()
        return original(*arguments, **keywords)

    Grpo._iteration = counted  # type: ignore[method-assign]
    setattr(owner, method, breaking)

    def undo() -> None:
        Grpo._iteration = iterate  # type: ignore[method-assign]
        setattr(owner, method, original)

    return undo


def hang() -> None:
    time.sleep(600)


if __name__ == "__main__":  # a process of its own that kills itself, or hangs: python rl_stage.py FOLDER NAME RECIPE.json WHERE [hang]
    given = Recipe.model_validate_json(Path(sys.argv[3]).read_text())
    if sys.argv[4] != "nowhere":
        break_at(sys.argv[4], 1, hang if sys.argv[5:] == ["hang"] else lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(given, Path(sys.argv[1]), sys.argv[2])
