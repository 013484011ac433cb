"""Seconds per RL iteration: Terrace's stage beside TRL's GRPOTrainer with transformers generation; continuous beside static batching.

    make bench-rl                                      # Terrace alone
    make bench-rl ARGS="--trl DIR --write TABLE.md"    # beside TRL: pip install --target DIR --no-deps "trl==1.16.*"
                                                       # "torchvision==0.28.*" datasets accelerate dill multiprocess xxhash

All train the same tiny Qwen2.5-VL from the same weights in fp32 on the same drawn images and questions, with the same number of
prompts, samples and tokens, one optimizer step per iteration, no KL, the same reward (the share of digits; Terrace in its sandbox, TRL
in the process). A random model ends its answers anywhere, so their lengths are drawn beforehand and are the same for all: `full`, every
answer as long as it may be, and `tail`, log-normal with sigma 1. The first two iterations are left out. All processes have the same
number of threads; `overlap` decodes in one while another trains, which is what it is for. Terrace decodes with the compiled step
(`compile_decoding`), unless `--plain-decoding` says otherwise. TRL's AsyncGRPOTrainer does not run here: its
attention is a kernel of FlashAttention-3, its weights go over NCCL.

The load of the machine is taken before and during every run. Where something else ran, the table is not written.
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine_load import Watch

OVERLAPPED_PROMPTS = 4096  # whose lengths are drawn: more than are ever begun
TAIL_TOKENS = 8  # times `--tokens` an answer of `tail` may be long


class Marks:
    """Time and processor time of this process at the end of every iteration."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))

    def figures(self) -> dict[str, float]:
        """Of the iterations after the second."""
        spans = [[late - early for early, late in zip(*pair)] for pair in itertools.pairwise(self._marks[1:])]
        wall, processor = zip(*spans)
        return {
            "seconds": statistics.mean(wall), "median_seconds": statistics.median(wall), "processor_seconds": statistics.mean(processor),
            "iterations": len(wall),
        }  # fmt: skip


def recipe_of(folder: Path, args: argparse.Namespace):
    """The benchmark's recipe: an image prompt in every group."""
    from rl_stage import rl_recipe

    from terrace.recipe.schema import Recipe

    grpo: dict[str, Any] = {
        "prompts_per_iteration": args.prompts, "samples_per_prompt": args.samples, "max_response_tokens": args.tokens,
        "dynamic_sampling": False, "compile_decoding": not args.plain_decoding,
    }  # fmt: skip
    if args.rollout != "rounds":
        grpo["rollout"] = "seamless"
    if args.rollout == "overlap":
        grpo["overlap"] = {"max_staleness": 2}
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


def run_terrace(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Mean seconds of an iteration and of its parts."""
    import torch
    from imposed_lengths import drawn, impose_on_terrace

    from terrace.data.prepare import load_prepared
    from terrace.rl.objective import Grpo
    from terrace.rl.prompt_feed import open_feed
    from terrace.train.loop import train_stage
    from terrace.worker.context import WorkerContext

    torch.set_num_threads(args.threads)
    marks, each = Marks(), args.rollout == "rounds"
    prompts = args.prompts * args.iterations if each else OVERLAPPED_PROMPTS
    impose_on_terrace(drawn(args.lengths, prompts, args.samples, args.tokens), args.prompts if each else None)
    stage_dir = folder / f"terrace-{args.lengths}-{args.rollout}"
    stage_dir.mkdir()
    recipe, context = recipe_of(folder, args), WorkerContext()
    feed = open_feed(recipe, 0, load_prepared(folder / "data"), context)
    train_stage(recipe, 0, feed, stage_dir, None, context, Grpo, [lambda event, _: marks.mark() if event == "step" else None])
    lines = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()][2:]
    names = ("rollout_seconds", "reward_seconds", "update_seconds", "sync_seconds")
    parts = {name: statistics.mean(line[name] for line in lines if name in line) for name in names}
    return marks.figures() | parts | {"response_tokens": statistics.mean(line["supervised_tokens"] for line in lines)}


def run_decoding(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Decoded tokens per second of the `native` engine on answers with a long tail: in batches, each until its last answer has ended and
    all of them computed until then (`static`), and continuously in as many places, with plain and with compiled steps."""
    import numpy as np
    import torch
    from imposed_lengths import drawn, impose_on_terrace
    from packs import IMAGE_PAD, VIDEO_PAD, segment

    from terrace.data.prepare import load_prepared
    from terrace.data.tokenizer import load_tokenizer
    from terrace.generation import native
    from terrace.generation.interface import Prompt, Sampling
    from terrace.models.build import build_model, model_config
    from terrace.models.shared_prompt import use_shared_prompt_attention

    torch.set_num_threads(args.threads)
    recipe = recipe_of(folder, args)
    config = model_config(recipe.model, load_tokenizer(load_prepared(folder / "data").tokenizer_dir))
    model = build_model(recipe.model, config)
    use_shared_prompt_attention(model, "sdpa_segments")
    prompts = []
    for number in range(args.decoded_prompts):
        ids, _, positions, patches, grids = segment(np.random.default_rng(number), 40, [(2, 3)])
        ids = np.where(ids == IMAGE_PAD, config.image_token_id, 150 + ids % 100).astype(np.int32)
        each = grids.prod(axis=1)
        prompts.append(Prompt(ids, positions, patches, grids, each // 4, each, key=("prompts", number), id=str(number), task="task"))
    lengths = drawn("tail", args.decoded_prompts, args.samples, args.tokens)
    impose_on_terrace(lengths, args.prompts if args.rollout == "static" else None)
    never, rows = (VIDEO_PAD,) if VIDEO_PAD < 300 else (), args.prompts * args.samples
    engine = native.NativeEngine(model, never, (0,), "cpu", "fp32", rows, compiled=args.rollout == "compiled")
    if args.rollout == "static":
        native.COMPACT_SHARE = 2.0  # no row leaves: what static batching is
    sampling = Sampling(args.samples, args.tokens, seed=1)
    began, processor = time.perf_counter(), time.process_time()
    if args.rollout == "static":
        for first in range(0, len(prompts), args.prompts):
            engine.generate(prompts[first : first + args.prompts], sampling)
    else:
        engine.generate(iter(prompts), sampling)
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": float(lengths.sum()) / seconds, "seconds": seconds, "processor_seconds": time.process_time() - processor,
        "idle_share_of_places": engine.usage.idle_share or 0.0, "steps": engine.usage.steps,
    }  # fmt: skip


def measured(which: str, lengths: str, rollout: str, folder: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """Figures of one process of its own; None if it failed."""
    tokens = args.tokens * (TAIL_TOKENS if lengths == "tail" else 1)
    command = [
        sys.executable, __file__, "--only", which, "--lengths", lengths, "--rollout", rollout, "--folder", str(folder),
        *(word for name in ("prompts", "samples", "pixels", "iterations", "threads", "decoded_prompts")
          for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))), "--tokens", str(tokens),
        *(["--plain-decoding"] if args.plain_decoding else []),
    ]  # fmt: skip
    path = [args.trl] if which == "trl" else []
    path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(f"{which} {lengths} {rollout}: not measured ({(done.stderr.strip().splitlines() or ['no output'])[-1]})")
        return None
    figures = json.loads(found[0].removeprefix("RESULT "))
    print(f"{which} {lengths} {rollout}: " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
    return figures


def table(results: dict[tuple[str, str, str], dict[str, Any]], args: argparse.Namespace) -> str:
    """The figures as Markdown, iterations and then decoding."""
    head = ("lengths", "", "seconds", "median", "processor seconds", "rollout", "update", "of TRL's seconds")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (which, lengths, rollout), one in results.items():
        if which == "decoding":
            continue
        peer = results.get(("trl", lengths, ""))
        parts = [f"{one[name]:.3f}" if name in one else "" for name in ("rollout_seconds", "update_seconds")]
        ratio = f"{one['seconds'] / peer['seconds']:.2f}" if peer and which == "terrace" else ""
        name = "TRL" if which == "trl" else f"Terrace, {rollout}"
        seconds = [f"{one[name]:.3f}" for name in ("seconds", "median_seconds", "processor_seconds")]
        lines.append("| " + " | ".join((lengths, name, *seconds, *parts, ratio)) + " |")
    decoded = {rollout: one for (which, _, rollout), one in results.items() if which == "decoding"}
    if decoded:
        lines += ["", "| batching | tokens per second | steps | places idle |", "|---|---|---|---|"]
        for kind, one in decoded.items():
            name = "continuous, compiled steps" if kind == "compiled" else kind
            lines.append(f"| {name} | {one['tokens_per_second']:.0f} | {one['steps']:.0f} | {one['idle_share_of_places']:.0%} |")
    shape = f"{args.prompts} prompts x {args.samples} samples x {args.tokens} tokens (tail: at most {TAIL_TOKENS * args.tokens})"
    lines += ["", f"{shape}, {args.threads} thread(s), {args.iterations - 2} iterations."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=100_352)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--decoded-prompts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plain-decoding", action="store_true", help="without the compiled decoding step")
    parser.add_argument("--trl", help="measure TRL too, with this folder on its path (see above)")
    parser.add_argument("--cases", nargs="*", default=["full", "tail", "decoding"], help="full, tail, decoding")
    parser.add_argument("--write", type=Path, help="write the table to this file, unless something else ran meanwhile")
    parser.add_argument("--only", choices=["terrace", "trl", "decoding"], help=argparse.SUPPRESS)
    parser.add_argument("--lengths", choices=["full", "tail"], default="full", help=argparse.SUPPRESS)
    parser.add_argument("--rollout", default="rounds", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        if args.only == "trl":
            from rl_peer import run_trl

            figures = run_trl(args.folder, args, Marks())
        else:
            figures = {"terrace": run_terrace, "decoding": run_decoding}[args.only](args.folder, args)
        print("RESULT " + json.dumps(figures))
        return
    from rl_stage import prepare
    from train_setup import export_weights

    runs: list[tuple[str, str, str]] = []
    for lengths in ("full", "tail"):
        if lengths in args.cases:
            runs += [("terrace", lengths, "rounds"), *([("trl", lengths, "")] if args.trl else []), ("terrace", lengths, "overlap")]
    if "decoding" in args.cases:
        runs += [("decoding", "tail", rollout) for rollout in ("static", "continuous", *(() if args.plain_decoding else ("compiled",)))]
    watch = Watch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_of(folder, args)
        prepare(folder, recipe)
        export_weights(recipe, folder, args.pixels)
        results = {run: found for run in runs if (found := measured(*run, folder, args)) is not None}
    load = watch.end()
    text = table(results, args)
    print(f"\n{text}\n\n{load}")
    if args.write:
        if not load.quiet:
            sys.exit(f"{args.write} is not written: something else ran meanwhile")
        if len(results) < len(runs):
            sys.exit(f"{args.write} is not written: not all was measured")
        args.write.write_text(f"{text}\n\n{load}\n")


if __name__ == "__main__":
    main()
