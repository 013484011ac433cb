"""A step of a stage of `dpo` beside TRL's DPOTrainer on pairs with a picture: the same weights, rows in the same order, and optimizer.

Each runs in a process of its own, in turns, so that what changes on the machine meets both. Terrace reads its rows from prepared shards
and computes the reference before the first step: the seconds of that, shared out over the steps, are added to each. TRL gets opened
pictures and computes the reference in every step (it refuses to do so beforehand where there are pictures). The first steps are left out.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WARM_STEPS, RATE, BETA, CLIP = 2, 1e-4, 0.1, 1.0
WORDS = ("the", "chart", "shows", "red", "blue", "green", "square", "circle", "left", "right", "above", "two", "line", "is", "near")


def write_rows(folder: Path, args: Namespace, count: int) -> None:
    """JSON Lines of prompts with a drawn picture and two answers of `args.words` words."""
    import numpy as np
    from PIL import Image

    rng, rows = np.random.default_rng(3), []
    for number in range(count):
        side = int(args.pixels**0.5)
        pixels = np.kron(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), np.ones((side // 8, side // 8, 1), np.uint8))
        Image.fromarray(pixels).save(folder / f"{number}.png")
        chosen, rejected = (" ".join(rng.choice(WORDS, args.words)) for _ in range(2))
        turns = [{"role": "user", "content": f"<image>What does picture {number} show?"}, {"role": "assistant", "content": chosen}]
        rows.append({"id": f"row{number}", "messages": turns, "rejected_response": rejected, "images": [f"{number}.png"]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(folder: Path, args: Namespace) -> Any:
    from rl_stage import pair_recipe

    from terrace.recipe.schema import Recipe

    values = pair_recipe(folder, steps=args.dpo_steps + WARM_STEPS, objective="dpo").model_dump(mode="json")
    values["data"]["sources"]["pairs"]["holdout_samples"] = 0
    values["stages"][0] |= {
        "train": {part: {"lr": RATE} for part in ("vision", "projector", "language")}, "checkpoint": {}, "sequence_length": 4096,
        "pixels": {"min": 784, "max": 2 * args.pixels}, "loss_chunk_tokens": 4096, "batch": {"packs": args.pairs}, "dpo": {"beta": BETA},
        "optimizer": {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "clip": CLIP},
    }  # fmt: skip
    config = values["model"]["config"]
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    config["text_config"]["rope_parameters"]["mrope_section"] = [8, 12, 12]
    config["vision_config"] |= {"depth": 4, "hidden_size": 128, "num_heads": 4, "out_hidden_size": 256, "fullatt_block_indexes": [1, 3]}
    return Recipe.model_validate(values)


def now() -> tuple[float, float]:
    """(wall-clock seconds, processor seconds of this process); other work on the machine changes the second less."""
    return time.perf_counter(), time.process_time()


class Clock:
    """Seconds between the ends of neighbouring steps."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, float]] = []

    def mark(self) -> None:
        self._ends.append(now())

    def medians(self, beside: Sequence[float] = (0.0, 0.0)) -> dict[str, float]:
        """Of wall-clock and processor seconds; `beside`: of both what is added to each step."""
        spans = [[late - early for early, late in zip(*pair)] for pair in itertools.pairwise(self._ends)][WARM_STEPS - 1 :]
        wall, processor = (statistics.median(values) + more for values, more in zip(zip(*spans), beside))
        return {"step_seconds": wall, "processor_seconds": processor}


def run_terrace(folder: Path, args: Namespace) -> dict[str, Any]:
    import torch

    from terrace.data.prepare import load_prepared
    from terrace.objectives.dpo import Dpo
    from terrace.rl.answer_feed import open_feed
    from terrace.train.loop import train_stage
    from terrace.worker.context import WorkerContext

    torch.set_num_threads(args.threads)
    order: list[list[str]] = []
    reference = [0.0, 0.0]

    class Told(Dpo):
        def before(self, examples: Any, scale: float) -> None:
            super().before(examples, scale)
            if self.strategy.model.training:
                order.append([name for example in examples for name in example.pack.sample_ids])

        def _make_reference(self, alive: Any) -> None:
            begun = now()
            super()._make_reference(alive)
            reference[:] = [sum(one) - early for *one, early in zip(reference, now(), begun)]

    recipe, context, clock = recipe_of(folder, args), WorkerContext(), Clock()
    feed = open_feed(recipe, 0, load_prepared(folder / "data"), context)
    with tempfile.TemporaryDirectory() as place:
        train_stage(recipe, 0, feed, Path(place), None, context, Told, [lambda event, _: clock.mark() if event == "step" else None])
        lines = [json.loads(line) for line in (Path(place) / "metrics.jsonl").read_text().splitlines()]
    (folder / "order.json").write_text(json.dumps(order))
    told = {name: [line[name] for line in lines] for name in ("loss", "chosen_logprob", "rejected_logprob")}
    shares = [seconds / len(lines) for seconds in reference]
    return told | clock.medians(shares) | {"reference_seconds_per_step": shares[0]}


def run_trl(folder: Path, args: Namespace) -> dict[str, Any]:
    import torch
    from trl_model import trl_model

    torch.set_num_threads(args.threads)
    from datasets import Dataset
    from PIL import Image
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    processor, model = trl_model(folder / "weights", 2 * args.pixels)
    written = {row["id"]: row for row in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())}
    rows = []
    for name in itertools.chain(*json.loads((folder / "order.json").read_text())):
        row = written[name]
        question = row["messages"][0]["content"].removeprefix("<image>")
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        rows.append({
            "images": [Image.open(folder / row["images"][0]).convert("RGB")],
            "prompt": processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False),
            "chosen": row["messages"][1]["content"] + "<|im_end|>", "rejected": row["rejected_response"] + "<|im_end|>",
        })  # fmt: skip
    clock = Clock()

    class Marks(TrainerCallback):
        def on_step_end(self, *_args: Any, **_keywords: Any) -> None:
            clock.mark()

    config = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=args.pairs, max_steps=args.dpo_steps + WARM_STEPS, learning_rate=RATE,
        beta=BETA, max_length=None, weight_decay=0.0, max_grad_norm=CLIP,
        lr_scheduler_type="constant", use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=processor, callbacks=[Marks()])
    trainer.train()
    lines = [line for line in trainer.state.log_history if "logps/chosen" in line]
    told = {ours: [line[theirs] for line in lines] for ours, theirs in (("loss", "loss"), ("chosen_logprob", "logps/chosen"))}
    return told | clock.medians()


KINDS = {"terrace": run_terrace, "trl": run_trl}


def measure(args: Namespace, script: str) -> dict[str, Any]:
    """Of each of KINDS (TRL where `args.trl` names its folder) the figures of the round with the median step, losses among them."""
    from train_setup import export_weights

    from terrace.data.prepare import prepare_data

    kinds = list(KINDS) if args.trl else ["terrace"]
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, args, args.pairs * (args.dpo_steps + WARM_STEPS))
        recipe = recipe_of(folder, args)
        prepare_data(recipe, folder, use_ray=False)
        export_weights(recipe, folder, 2 * args.pixels)
        for _ in range(args.rounds):
            for kind in kinds:
                path = [args.trl] if kind != "terrace" else []
                path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
                command = [sys.executable, script, *args.given, "--run", kind, "--folder", name]
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                answers = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not answers:
                    raise SystemExit(f"{kind}: {done.stderr[-2000:]}")
                found[kind].append(json.loads(answers[-1].removeprefix("RESULT ")))
    return {kind: sorted(rounds, key=lambda one: one["step_seconds"])[len(rounds) // 2] for kind, rounds in found.items()}
