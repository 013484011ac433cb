"""Seconds per RL iteration: Terrace's on-policy stage beside TRL's GRPOTrainer with transformers generation, on CPU.

    make bench-rl                         # Terrace alone
    make bench-rl ARGS="--trl DIR"        # beside TRL, of `pip install -e '.[bench]'`; DIR has torchvision, which TRL's
                                          # processor wants: pip install --target DIR --no-deps "torchvision==0.28.*"

Both train the same tiny Qwen2.5-VL from the same weights in fp32 on the same drawn images and questions, with the same
number of prompts, samples and tokens, one optimizer step per iteration, no KL, the same reward (the share of digits;
Terrace in its sandbox, TRL in the process). The first iteration is left out. Both processes have the same number of
threads; beside the seconds stand the seconds of processor time, which other load on the machine changes less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def recipe_of(folder: Path, args: argparse.Namespace):
    """The benchmark's recipe: an image prompt in every group."""
    from rl_stage import rl_recipe

    from terrace.recipe.schema import Recipe

    grpo = {
        "prompts_per_iteration": args.prompts, "samples_per_prompt": args.samples, "max_response_tokens": args.tokens,
        "dynamic_sampling": False,
    }  # fmt: skip
    recipe = rl_recipe(folder, args.iterations, grpo, mixture={"weights": {"digits": 1.0}}, sequence_length=4096)
    values = recipe.model_dump(mode="json")
    values["data"]["sources"]["digits"]["holdout_samples"] = 0
    values["stages"][0] |= {
        "train": {"vision": {"lr": 1e-4}, "projector": {"lr": 1e-4}, "language": {"lr": 1e-4}}, "checkpoint": {},
        "pixels": {"min": 784, "max": args.pixels}, "loss_chunk_tokens": 4096,
    }  # fmt: skip
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    values["model"]["config"]["text_config"] |= text
    values["model"]["config"]["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
    values["model"]["config"]["vision_config"] |= {"depth": 4, "out_hidden_size": 128, "fullatt_block_indexes": [1, 3]}
    return Recipe.model_validate(values)


class Marks:
    """Time and processor time of this process at the end of every iteration."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))

    def medians(self) -> dict[str, float]:
        """Of the differences between neighbouring marks."""
        spans = [[late - early for early, late in zip(*pair)] for pair in itertools.pairwise(self._marks)]
        wall, processor = (statistics.median(values) for values in zip(*spans))
        return {"step_seconds": wall, "processor_seconds": processor}


def run_terrace(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of an iteration and of its parts."""
    import torch

    from terrace.data.prepare import load_prepared
    from terrace.rl.objective import Grpo
    from terrace.rl.prompt_feed import open_feed
    from terrace.train.loop import train_stage
    from terrace.worker.context import WorkerContext

    torch.set_num_threads(args.threads)
    marks = Marks()
    stage_dir = folder / "terrace"
    stage_dir.mkdir()
    recipe, context = recipe_of(folder, args), WorkerContext()
    feed = open_feed(recipe, 0, load_prepared(folder / "data"), context)
    train_stage(recipe, 0, feed, stage_dir, None, context, Grpo, [lambda event, _: marks.mark() if event == "step" else None])
    lines = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()][1:]
    names = ("rollout_seconds", "reward_seconds", "update_seconds", "sync_seconds")
    parts = {name: statistics.median(line[name] for line in lines) for name in names}
    return marks.medians() | parts | {"response_tokens": statistics.mean(line["supervised_tokens"] for line in lines)}


def run_trl(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a training step of TRL, from its own weights folder."""
    import torch

    torch.set_num_threads(args.threads)
    library = torch.library.Library(
        "torchvision", "DEF"
    )  # torchvision's wheel is built for CUDA; nothing here calls these
    library.define("nms(Tensor x) -> Tensor")
    library.define("qnms(Tensor x) -> Tensor")
    from datasets import Dataset
    from PIL import Image
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer

    weights = folder / "weights"
    tokenizer = Qwen2TokenizerFast.from_pretrained(weights, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=784, max_pixels=args.pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(weights, dtype=torch.float32, attn_implementation="sdpa")
    rows = [json.loads(line) for line in (folder / "digits.jsonl").read_text().splitlines()]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["messages"][0]["content"].removeprefix("<image>")}],
                "image": Image.open(folder / row["images"][0]).convert("RGB"),
            }
            for row in rows
        ]
    )
    marks = Marks()

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_keywords):
            marks.mark()

    def digits(completions, **_):
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        texts = [t if isinstance(t, str) else "".join(part.get("text", "") for part in t) for t in texts]
        return [sum(char.isdigit() for char in text) / max(len(text), 1) for text in texts]

    batch = args.prompts * args.samples
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        num_generations=args.samples,
        gradient_accumulation_steps=1,
        max_completion_length=args.tokens,
        beta=0.0,
        loss_type="dapo",
        learning_rate=1e-4,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        max_steps=args.iterations,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[digits],
        args=config,
        train_dataset=data,
        processing_class=processor,
        callbacks=[Clock()],
    )
    trainer.train()
    return marks.medians()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=100_352)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", help="measure TRL too, with this folder on its path (see above)")
    parser.add_argument("--only", choices=["terrace", "trl"])
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.only:
        figures = {"terrace": run_terrace, "trl": run_trl}[args.only](args.folder, args)
        print("RESULT " + json.dumps(figures))
        return
    from rl_stage import prepare
    from train_setup import export_weights

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_of(folder, args)
        prepare(folder, recipe)
        export_weights(recipe, folder, args.pixels)
        results = {}
        for which in ("terrace", "trl") if args.trl else ("terrace",):
            command = [sys.executable, __file__, *sys.argv[1:], "--only", which, "--folder", name]
            path = [args.trl] if which == "trl" else []
            path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if found:
                results[which] = json.loads(found[0].removeprefix("RESULT "))
            else:
                print(f"{which}: not measured ({(done.stderr.strip().splitlines() or ['no output'])[-1]})")
    shape = f"{args.prompts} prompts x {args.samples} samples x {args.tokens} tokens, {args.threads} threads"
    print(f"\nSeconds per iteration, median of {args.iterations - 1}, {shape}\n")
    for which, figures in results.items():
        print(f"{which:8s} " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    if len(results) == 2:
        ratios = [results["terrace"][name] / results["trl"][name] for name in ("step_seconds", "processor_seconds")]
        print(f"\nTerrace takes {ratios[0]:.2f} of TRL's time, {ratios[1]:.2f} of its processor time.")


if __name__ == "__main__":
    main()
