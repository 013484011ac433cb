"""What a training step costs beside a bare PyTorch loop, beside transformers.Trainer, and under each strategy. On CPU.

    make bench-train                          # everything, about 8 minutes on two cores
    make bench-train ARGS="--only bare"       # one of: bare, trainer, strategies, memory
    make bench-train ARGS="--only bare --compile"    # with parallel.compile beside the same bare loop

*bare*: the same model, packs and optimizer in the fewest lines of PyTorch (whole logits, no metrics, no checks). One step
of it runs before each step of Terrace's stage, inside the stage's own data feed, so both see the same machine at the
same moment; the ratio is the median over pairs. Data is excluded on both sides. Beside wall-clock seconds stand those of
the processor (all threads of the process), which other users of a shared machine disturb less.

*trainer*: transformers.Trainer on the samples of the same packs, as one would give them to it: padded to the longest of
each batch of 8, gradients accumulated over the step. Its time is from `on_step_begin` to `on_step_end`, without data.

*strategies*: two gloo processes, step time of each strategy over that of DDP.

*memory*: bytes per parameter that each strategy holds on one of two ranks in bf16, all parts training, between backward
and optimizer step: all tensors alive in the process, each storage once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from train_setup import bench_recipe, full_pack, small_model, tiny_model

from terrace.data.types import PackedExample
from terrace.models.attention import use_attention
from terrace.models.batch import ImageFacts, to_device
from terrace.models.build import build_model, model_config
from terrace.models.families.registry import family_model_named
from terrace.models.forward import pack_hidden
from terrace.objectives.interface import StageFeed
from terrace.objectives.lm import LanguageModelling
from terrace.recipe.schema import Recipe
from terrace.train.loop import train_stage
from terrace.worker.context import WorkerContext

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
WARM_STEPS = 2


@dataclass
class Step:
    step: int
    packs: list[PackedExample]
    wait_seconds: float = 0.0


def recipe_of(args: argparse.Namespace, strategy: str = "ddp", extra_steps: int = 0) -> Recipe:
    model = tiny_model() if args.tiny else small_model()
    parallel = {"strategy": strategy, "compile": args.compile}
    return bench_recipe(model, args.steps + WARM_STEPS + extra_steps, args.packs, args.length, parallel=parallel)


def packs_of(args: argparse.Namespace, step: int) -> list[PackedExample]:
    return [full_pack(step * args.packs + place, args.length, args.samples) for place in range(args.packs)]


# ---------------------------------------------------------------- bare


class BareLoop:
    """Model, optimizer and a step, as short as it can be written."""

    def __init__(self, recipe: Recipe) -> None:
        self.model = build_model(recipe.model, model_config(recipe.model))
        use_attention(self.model, "sdpa_segments")
        self.model.train()
        self.losses: list[float] = []
        stage = recipe.stages[0]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, betas=stage.optimizer.betas, weight_decay=stage.optimizer.weight_decay, fused=True
        )

    def step(self, packs: list[PackedExample]) -> None:
        supervised = sum(pack.supervised_tokens for pack in packs)
        total = 0.0
        for pack in packs:
            batch = to_device(pack, "cpu", torch.float32)
            logits = self.model.lm_head(pack_hidden(self.model, batch)[batch.supervised_rows])
            loss = F.cross_entropy(logits, batch.targets, reduction="sum") / supervised
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total)


def now() -> np.ndarray:
    """(wall-clock seconds, processor seconds of this process)."""
    return np.asarray([time.perf_counter(), time.process_time()])


def measure_bare(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of both, and the median of the ratios of neighbouring steps."""
    recipe = recipe_of(args, extra_steps=1)  # the last step writes a checkpoint and is left out
    bare, theirs, ours = BareLoop(recipe), [], []

    def stream(start: int) -> Iterator[Step]:
        for step in range(start, args.steps + WARM_STEPS + 1):
            packs = packs_of(args, step)
            begun = now()
            bare.step(packs)
            theirs.append(now() - begun)
            begun = now()
            yield Step(step, packs)
            ours.append(now() - begun)  # everything that the loop does until it asks for the next step

    with tempfile.TemporaryDirectory() as folder:
        lines = run_stage(recipe, stream, WorkerContext(), Path(folder))
    mine, other = np.asarray(ours)[WARM_STEPS:-1], np.asarray(theirs)[WARM_STEPS:-1]
    ratios = np.median(mine / other, axis=0)
    return {
        "terrace_seconds": float(np.median(mine[:, 0])), "bare_seconds": float(np.median(other[:, 0])),
        "terrace_cpu_seconds": float(np.median(mine[:, 1])), "bare_cpu_seconds": float(np.median(other[:, 1])),
        "ratio": float(ratios[0]), "cpu_ratio": float(ratios[1]), "cpu_ratios": (mine / other)[:, 1].round(4).tolist(),
        "loss_difference": max(abs(line["loss"] - loss) / loss for line, loss in zip(lines, bare.losses)),
        "flops_per_second": statistics.median(line["model_flops"] for line in lines) / float(np.median(mine[:, 1])),
    }  # fmt: skip


def run_stage(recipe: Recipe, stream: Any, context: WorkerContext, folder: Path) -> list[dict[str, Any]]:
    """The stage's lines of metrics.jsonl. `folder` is the same on all ranks: they write one checkpoint together."""
    feed = StageFeed(
        config=model_config(recipe.model), total_steps=int(recipe.stages[0].budget.steps or 0), stream=stream,
        state=lambda step: {"pack": step}, restore=lambda state: None,
    )  # fmt: skip
    train_stage(recipe, 0, feed, folder, None, context, LanguageModelling)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- Trainer


def samples_of(pack: PackedExample) -> list[dict[str, Any]]:
    """The samples of a pack as a dataset for Trainer holds them: token ids, labels, pixels in float32, grids."""
    samples, start, patch, image = [], 0, 0, 0
    for end in (int(e) for e in pack.segment_ends):
        ids = torch.from_numpy(pack.input_ids[start:end].astype(np.int64))
        targets = torch.from_numpy(pack.targets[start:end].astype(np.int64))
        labels = torch.cat([torch.tensor([-100]), targets[:-1]])  # the model shifts by itself
        sample: dict[str, Any] = {"input_ids": ids, "labels": labels}
        visual = int((pack.input_ids[start:end] == pack_image_token()).sum())
        if visual:
            grid = torch.from_numpy(pack.image_facts[image : image + 1].astype(np.int64))
            count = int(grid.prod())
            facts = ImageFacts(grid, torch.tensor([count // 4]), torch.tensor([count]))
            family = family_model_named("qwen2_5_vl")
            pixels = family.normalised(torch.from_numpy(pack.pixels[patch : patch + count]), torch.float32)
            sample |= family.inputs(pixels, facts)
            patch, image = patch + count, image + 1
        samples.append(sample)
        start = end
    return samples


def pack_image_token() -> int:
    from packs import IMAGE_PAD

    return IMAGE_PAD


def padded(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The usual collator: pad to the longest, images one after another."""
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([sample["input_ids"] for sample in samples], batch_first=True, padding_value=0)
    mask = pad_sequence([torch.ones_like(sample["input_ids"]) for sample in samples], batch_first=True)
    batch = {
        "input_ids": ids, "attention_mask": mask,
        "labels": pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
        "mm_token_type_ids": (ids == pack_image_token()).int(),
    }  # fmt: skip
    images = [sample for sample in samples if "pixel_values" in sample]
    if images:
        batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in images])
        batch["image_grid_thw"] = torch.cat([sample["image_grid_thw"] for sample in images])
    return batch


def measure_trainer(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step of transformers.Trainer, and the share of its tokens that is padding."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    recipe = recipe_of(args)
    model = build_model(recipe.model, model_config(recipe.model))
    use_attention(model, "sdpa")
    total = args.steps + WARM_STEPS
    samples = [sample for step in range(total) for pack in packs_of(args, step) for sample in samples_of(pack)]
    batch = min(8, args.samples)
    seconds: list[np.ndarray] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_keywords: Any) -> None:
            self.begun = now()

        def on_step_end(self, *_args: Any, **_keywords: Any) -> None:
            seconds.append(now() - self.begun)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=total, report_to=[], save_strategy="no",
            gradient_accumulation_steps=args.packs * args.samples // batch, logging_strategy="no", use_cpu=True,
            learning_rate=1e-5, weight_decay=0.1, max_grad_norm=1.0, lr_scheduler_type="constant", disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False, train_sampling_strategy="sequential",
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=samples, data_collator=padded, callbacks=[Clock()]).train()
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    groups = [samples[start : start + batch] for start in range(0, len(samples), batch)]
    held = sum(len(group) * max(len(sample["input_ids"]) for sample in group) for group in groups)
    wall, cpu = np.median(np.asarray(seconds)[WARM_STEPS:], axis=0)
    return {"trainer_seconds": float(wall), "trainer_cpu_seconds": float(cpu), "padding_share": 1 - tokens / held}


# ---------------------------------------------------------------- strategies


def strategy_seconds(rank: int, world_size: int, args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Median (wall-clock, processor) seconds of this rank's steps under every strategy, one after another."""
    torch.set_num_threads(1)
    share, found = args.packs // world_size, {}
    for name in STRATEGIES:
        seconds: list[np.ndarray] = []

        def stream(start: int, seconds: list[np.ndarray] = seconds) -> Iterator[Step]:
            for step in range(start, args.steps + WARM_STEPS + 1):
                packs = packs_of(args, step)[rank * share : (rank + 1) * share]
                begun = now()
                yield Step(step, packs)
                seconds.append(now() - begun)

        context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
        run_stage(recipe_of(args, name, extra_steps=1), stream, context, folder / name)
        found[name] = np.median(np.asarray(seconds)[WARM_STEPS:-1], axis=0).tolist()
    return found


# ---------------------------------------------------------------- memory


def held_bytes() -> int:
    """Bytes of all tensors that this process can reach, each storage once."""
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if not isinstance(found, torch.Tensor):
            continue
        for tensor in (found, found.grad if found.is_leaf else None):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local is not None and local.device.type == "cpu" and local.untyped_storage().nbytes():
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def strategy_memory(rank: int, world_size: int, args: argparse.Namespace, name: str) -> float:
    """Bytes per parameter of the model under one strategy, with two packs per rank and step."""
    from functools import partial

    from terrace.models.batch import to_device
    from terrace.objectives.lm import summed_loss
    from terrace.train.optimizer import parameter_groups
    from terrace.train.setup import prepare_strategy

    model = tiny_model() if args.tiny else small_model()
    recipe = bench_recipe(model, 2, 2 * world_size, 128, precision="bf16", parallel={"strategy": name})
    config, stage = model_config(recipe.model), recipe.stages[0]
    context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
    before = held_bytes()
    strategy = prepare_strategy(recipe.model, stage, config, context, partial(summed_loss, chunk_tokens=64))
    sizes = {n: int(np.prod(getattr(p, "ds_shape", p.shape))) for n, p in strategy.model.named_parameters()}
    rates = [(group.peak_lr, group.weight_decay) for group in parameter_groups(strategy.model, stage)]
    held = 0
    for _ in range(2):  # moments exist from the first step on
        for place in range(2):
            batch = to_device(full_pack(2 * rank + place, 128, 3), context.device, torch.bfloat16)
            strategy.accumulate(batch, 1e-3, last=place == 1)
            del batch
        gc.collect()
        held = held_bytes() - before
        strategy.clip(1.0)
        strategy.step(rates)
    return held / sum(sizes.values())


# ---------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["bare", "trainer", "strategies", "memory"])
    parser.add_argument("--steps", type=int, default=16, help="measured steps (2 more come first)")
    parser.add_argument("--packs", type=int, default=2, help="packs per step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a pack")
    parser.add_argument("--samples", type=int, default=8, help="samples of a pack")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="Terrace's blocks through torch.compile (parallel.compile)")
    parser.add_argument("--tiny", action="store_true", help="a model for testing this script")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    if args.only in (None, "bare"):
        results |= measure_bare(args)
        print(
            f"terrace {results['terrace_seconds']:.3f} s, bare {results['bare_seconds']:.3f} s a step: ratio {results['ratio']:.4f}; "
            f"processor {results['terrace_cpu_seconds']:.3f} and {results['bare_cpu_seconds']:.3f} s: ratio {results['cpu_ratio']:.4f}"
        )
    if args.only in (None, "trainer"):
        results |= measure_trainer(args)
        if "terrace_seconds" not in results:
            results |= measure_bare(args)
        for kind in ("", "cpu_"):
            results[f"trainer_{kind}ratio"] = results[f"terrace_{kind}seconds"] / results[f"trainer_{kind}seconds"]
        print(
            f"terrace {results['terrace_seconds']:.3f} s, Trainer {results['trainer_seconds']:.3f} s a step: ratio "
            f"{results['trainer_ratio']:.3f}; processor {results['terrace_cpu_seconds']:.3f} and {results['trainer_cpu_seconds']:.3f} s: "
            f"ratio {results['trainer_cpu_ratio']:.3f} ({results['padding_share']:.0%} of Trainer's tokens are padding)"
        )
    if args.only in (None, "strategies"):
        from processes import run_ranks

        with tempfile.TemporaryDirectory() as folder:
            ranks = run_ranks(2, strategy_seconds, args, Path(folder), timeout=900)
        results["strategies"] = {
            name: {"seconds": max(rank[name][0] for rank in ranks), "cpu_seconds": sum(rank[name][1] for rank in ranks)}
            for name in STRATEGIES
        }
        ddp = results["strategies"]["ddp"]
        for name, found in results["strategies"].items():
            print(
                f"{name:6s} {found['seconds']:.3f} s a step on 2 processes ({found['seconds'] / ddp['seconds']:.2f} of ddp), processor "
                f"{found['cpu_seconds']:.3f} s ({found['cpu_seconds'] / ddp['cpu_seconds']:.2f} of ddp)"
            )
    if args.only in (None, "memory"):
        from processes import run_ranks

        results["memory"] = {name: run_ranks(2, strategy_memory, args, name, timeout=900)[0] for name in STRATEGIES}
        print("bytes per parameter on one of 2 ranks: " + ", ".join(f"{name} {value:.2f}" for name, value in results["memory"].items()))
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
