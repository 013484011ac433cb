"""Everything about a CUDA GPU in one run under 8 minutes: attention kernels, loss, and training a 3B-shaped model.

    python tests/bench/gpu_check.py --out gpu.json        # on the GPU machine; needs torch and transformers
    python tests/bench/gpu_check.py --tiny                # the same code on a CPU, seconds

Neither Ray, DeepSpeed nor MLflow is imported (fp16 under DeepSpeed is checked where it happens to be installed), and
pydantic only where it is there.

1. *kernels*: every attention backend that runs here equals exact attention in float32, forward and backward, on vision
   windows, whole images and causal samples with grouped heads; and how long each takes.
2. *loss*: the chunked cross-entropy equals the plain one in loss and gradients; memory of both.
3. *training*: Qwen2.5-VL-3B's shape, all parts training, packs of 8,192 tokens that are half image: tokens/s, MFU, peak
   memory beside the planner's figure, for several settings.
4. *fp16*: DeepSpeed's fp16 recovers from a forced overflow, where DeepSpeed is installed.

A section that fails is named in the result and the others still run; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parents[1] / "platform"):
    sys.path.insert(0, str(folder))

# ruff: noqa: E402 (the paths above come first, so that nothing has to be installed)
import plain_schema

plain_schema.stand_in_where_missing()

import torch
import torch.nn.functional as F
from train_setup import bench_recipe, full_pack, qwen_3b, tiny_model

from terrace.models import attention
from terrace.models.head import summed_cross_entropy
from terrace.models.weights import LoadReport
from terrace.planner.memory import PackSize, stage_memory
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

BUDGET_SECONDS = 420.0  # no new training variant is begun after this
KERNEL_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest value
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    ours, reference = ours.detach().float(), reference.detach().float()
    return float((ours - reference).abs().max() / reference.abs().max().clamp_min(1e-12))


def timed(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Milliseconds of one call, after one that is not counted."""
    function()
    synchronise(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronise(device)
    return (time.perf_counter() - begun) / repeats * 1e3


# ---------------------------------------------------------------- 1. kernels


def kernel_cases(tiny: bool) -> dict[str, dict[str, Any]]:
    """Heads, key/value heads, head size, segment lengths and causality as the 3B model has them."""
    scale = 16 if tiny else 1
    return {
        "vision windows": {"heads": 16, "key_heads": 16, "size": 80, "lengths": [64] * (128 // scale) + [48, 20, 4], "causal": False},
        "vision images": {"heads": 16, "key_heads": 16, "size": 80, "lengths": [2304 // scale, 3136 // scale, 484, 4], "causal": False},
        "language": {"heads": 16, "key_heads": 2, "size": 128, "lengths": [3000 // scale, 1900 // scale, 700, 129, 64, 1], "causal": True},
    }


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], causal: bool) -> torch.Tensor:
    """The definition, segment by segment with an explicit mask, in float32. [T, H, D] each, heads already repeated."""
    outputs = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        scores = torch.einsum("qhd,khd->hqk", a, b) * a.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c))
    return torch.cat(outputs)


def run_backend(name: str, q: Any, k: Any, v: Any, lengths: list[int], causal: bool) -> torch.Tensor:
    """One of the adapter's backends on [T, H, D]."""
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=q.device)
    scale = q.shape[-1] ** -0.5
    if name == "sdpa_segments":
        swapped = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)]
        return attention.sdpa_segments(*swapped, ends.tolist(), causal, scale)[0]
    kernel = {"varlen": attention.varlen_segments, "flash_attn": attention.flash_attn_segments, "flex": attention.flex_segments}
    return kernel[name.removesuffix(" fa3")](q, k, v, ends, max(lengths), causal, scale)


def check_kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Errors against exact attention, and milliseconds forward and backward, per case, backend and precision."""
    device = args.device
    cuda = device.startswith("cuda")
    backends = ["sdpa_segments"]
    if cuda:
        backends += ["varlen", "flex"] + (["flash_attn"] if importlib.util.find_spec("flash_attn") else [])
        if attention.activate_flash_attention_3()[0]:
            backends.append("varlen fa3")
            attention.restore_flash_attention_2()
    results: dict[str, Any] = {}
    for case, values in kernel_cases(args.tiny).items():
        lengths, causal = values["lengths"], values["causal"]
        shapes = [(sum(lengths), heads, values["size"]) for heads in (values["heads"], values["key_heads"], values["key_heads"])]
        generator = torch.Generator(device="cpu").manual_seed(0)
        base = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        slope = torch.randn(shapes[0], generator=generator).to(device)
        for dtype in [torch.bfloat16, torch.float16] if cuda else [torch.float32, torch.bfloat16]:
            inputs = [tensor.to(dtype) for tensor in base]
            reference = [tensor.float().requires_grad_() for tensor in inputs]
            group = values["heads"] // values["key_heads"]
            repeated = [reference[0], *(tensor.repeat_interleave(group, dim=1) for tensor in reference[1:])]
            expected = exact_attention(*repeated, lengths, causal)
            expected_gradients = torch.autograd.grad(expected, reference, slope.to(dtype).float())
            for backend in backends:
                if backend == "flex" and (case, dtype) != ("language", torch.bfloat16):
                    continue  # compiling it takes half a minute per case
                label = f"{case}, {backend}, {str(dtype).removeprefix('torch.')}"
                results[label] = _one_kernel(backend, inputs, slope.to(dtype), lengths, causal, expected, expected_gradients, args)
    return results


def _one_kernel(
    backend: str, inputs: list[torch.Tensor], slope: torch.Tensor, lengths: list[int], causal: bool, expected: torch.Tensor,
    expected_gradients: Any, args: argparse.Namespace,
) -> dict[str, Any]:
    if backend.endswith("fa3"):
        attention.activate_flash_attention_3()
    try:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]

        def forward_backward() -> Any:
            out = run_backend(backend, *leaves, lengths, causal)
            return out, torch.autograd.grad(out, leaves, slope)

        out, gradients = forward_backward()
        tolerance = KERNEL_TOLERANCE[slope.dtype]
        errors = [relative(out, expected), *(relative(ours, theirs) for ours, theirs in zip(gradients, expected_gradients))]
        milliseconds = timed(forward_backward, args.device, 1 if args.tiny else 10)
        return {"errors": errors, "tolerance": tolerance, "good": max(errors) < tolerance, "milliseconds": round(milliseconds, 3)}
    except Exception as error:  # one backend that cannot run must not hide the others
        return {"good": False, "error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        if backend.endswith("fa3"):
            attention.restore_flash_attention_2()


# ---------------------------------------------------------------- 2. loss


def check_loss(args: argparse.Namespace) -> dict[str, Any]:
    """Chunked against plain cross-entropy: loss, gradients, peak memory, milliseconds."""
    rows, width, vocabulary = (300, 64, 512) if args.tiny else (4096, 2048, 151_936)
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        hidden = torch.randn(rows, width, device=args.device, dtype=dtype).requires_grad_()
        weight = (torch.randn(vocabulary, width, device=args.device) * width**-0.5).to(dtype).requires_grad_()
        targets = torch.randint(0, vocabulary, (rows,), device=args.device)

        def plain(hidden: Any = hidden, weight: Any = weight, targets: Any = targets) -> Any:
            loss = F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")
            return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])

        def chunked(hidden: Any = hidden, weight: Any = weight, targets: Any = targets) -> Any:
            loss = summed_cross_entropy(hidden, weight, targets, 64 if args.tiny else 1024)
            return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])

        made = {}
        found: dict[str, Any] = {}
        for name, function in (("plain", plain), ("chunked", chunked)):
            if args.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            made[name] = function()
            if args.device.startswith("cuda"):
                found[f"{name}_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            found[f"{name}_milliseconds"] = round(timed(function, args.device, 1 if args.tiny else 5), 2)
        errors = [relative(ours, theirs) for ours, theirs in zip(made["chunked"], made["plain"])]
        tolerance = LOSS_TOLERANCE[dtype]
        found |= {"errors": errors, "tolerance": tolerance, "good": max(errors) < tolerance}
        results[str(dtype).removeprefix("torch.")] = found
    return results


# ---------------------------------------------------------------- 3. training

VARIANTS: dict[str, dict[str, Any]] = {
    # settings of the stage; the best one is what a user would choose for this GPU
    "fsdp": {"parallel": {"strategy": "fsdp"}},
    "fsdp, vision recomputed": {"parallel": {"strategy": "fsdp"}, "recompute": ["vision"]},
    "ddp, vision recomputed": {"parallel": {"strategy": "ddp"}, "recompute": ["vision"]},  # without, it needs 135 GiB
    "fsdp, all recomputed": {"parallel": {"strategy": "fsdp"}, "recompute": ["vision", "language"]},
}


def variant_recipe(args: argparse.Namespace, settings: dict[str, Any]) -> Recipe:
    settings = dict(settings)
    recompute = settings.pop("recompute", [])
    train = {part: {"lr": 1e-5, "activation_checkpointing": part in recompute} for part in ("vision", "projector", "language")}
    model = tiny_model() if args.tiny else qwen_3b()
    options = {"train": train, "precision": "bf16", "loss_chunk_tokens": 2048, **settings}
    return bench_recipe(model, args.steps, args.packs, args.length, **options)


def fast_source(device: str) -> Callable[..., Any]:
    """Random weights drawn on the device, in place of the recipe's (half a minute for 3 billion on a CPU)."""

    def initial(_model: Any, skeleton: Any, _start: Any = None, _changes: Any = None) -> Any:
        shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
        torch.manual_seed(0)

        def read(name: str) -> torch.Tensor:
            if "norm" in name or name.endswith("ln_q.weight"):
                return torch.ones(shapes[name], device=device)
            if name.endswith(".bias"):
                return torch.zeros(shapes[name], device=device)
            return torch.randn(shapes[name], device=device) * 0.02

        return read, LoadReport()

    return initial


def train_variant(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Steps of one variant through Terrace's own step, counted and measured as in a stage."""
    from unittest import mock

    from terrace.models.build import model_config
    from terrace.objectives.interface import Opening, StageFeed, StepExamples
    from terrace.objectives.lm import LanguageModelling
    from terrace.planner.shapes import shape_of_config
    from terrace.train.measure import Meter, take_memory_peak
    from terrace.train.optimizer import parameter_groups
    from terrace.train.setup import prepare_strategy
    from terrace.train.step import count_batch, run_step, seed_step

    recipe = variant_recipe(args, settings)
    stage, context, config = recipe.stages[0], WorkerContext(device=args.device), model_config(recipe.model)
    take_memory_peak(args.device)
    with mock.patch("terrace.train.setup.initial_weights", fast_source(args.device)):
        feed = StageFeed(config, 0, lambda start: iter(()), lambda step: {}, lambda state: None)
        objective = LanguageModelling(Opening(recipe, stage, feed, context, Path()))
        strategy = prepare_strategy(recipe.model, stage, config, context, objective.loss)
    groups = parameter_groups(strategy.model, stage)
    rates = [(group.peak_lr, group.weight_decay) for group in groups]
    meter = Meter(config, stage, recipe.model, recipe.planning, context)
    batches = [
        [full_pack(step * args.packs + place, args.length, args.samples) for place in range(args.packs)] for step in range(2)
    ]
    seconds, losses, peak, counts = [], [], 0.0, None
    for step in range(args.warm_steps + args.steps):
        packs = batches[step % 2]
        synchronise(args.device)
        begun = time.perf_counter()
        counts = count_batch(objective, StepExamples(step, packs), ["mixed"], False, context, meter)
        seed_step(0, step, 0)
        outcome = run_step(strategy, objective, packs, counts.divisor, rates, stage, step + 1, context)
        synchronise(args.device)
        if step >= args.warm_steps:
            seconds.append(time.perf_counter() - begun)
        losses.append(outcome.loss)
        peak = max(peak, outcome.memory_peak_bytes or 0.0)
    mean = sum(seconds) / len(seconds)
    visual = sum(pack.visual_tokens for pack in batches[0]) / args.packs
    size = PackSize(args.length, visual, counts.supervised_tokens / args.packs)
    planned = stage_memory(shape_of_config(config.to_dict(), "qwen2_5_vl"), stage, 1, size, args.device.startswith("cuda"))
    figures = meter.values(counts.model_flops, mean)
    return {
        "good": all(map(math.isfinite, losses)) and losses[-1] < losses[(len(losses) - 1) % 2],
        "step_seconds": mean, "spread": (max(seconds) - min(seconds)) / mean,
        "tokens_per_second": counts.tokens / mean, "mfu": figures.get("mfu"), "tflops": figures["flops_per_second"] / 1e12,
        "peak_gib": peak / 2**30, "planned_gib": planned.total / 2**30, "losses": [losses[0], losses[-1]],
        "tokens": counts.tokens, "visual_tokens": counts.visual_tokens, "packs": args.packs,
    }  # fmt: skip


def check_training(args: argparse.Namespace, started: float) -> dict[str, Any]:
    """Every variant that fits into the time."""
    results: dict[str, Any] = {}
    for name, settings in VARIANTS.items():
        if results and time.perf_counter() - started > args.budget_seconds:
            results[name] = {"skipped": "out of time"}
            continue
        try:
            results[name] = train_variant(args, settings)
        except Exception as error:  # an out-of-memory variant is a result, too
            results[name] = {"good": False, "error": f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-1500:]}
        if args.device.startswith("cuda"):
            import gc

            gc.collect()
            torch.cuda.empty_cache()
    return results


# ---------------------------------------------------------------- 4. fp16


def check_fp16(args: argparse.Namespace) -> dict[str, Any]:
    """fp16 under DeepSpeed on a tiny model: an overflow skips a step, and training goes on."""
    if importlib.util.find_spec("deepspeed") is None or not args.device.startswith("cuda"):
        return {"skipped": "needs DeepSpeed and a CUDA device"}
    tiny = argparse.Namespace(**{**vars(args), "tiny": True, "length": 256, "packs": 2, "samples": 3, "steps": 8, "warm_steps": 0})
    from terrace.train.loss_scale import LossScale

    found = {}
    defaults = LossScale.__init__.__defaults__
    LossScale.__init__.__defaults__ = (2.0**24, 1000, 0, 0)  # overflows at once
    try:
        for strategy in ("zero1", "zero2", "zero3"):
            found[strategy] = train_variant(tiny, {"parallel": {"strategy": strategy}, "precision": "fp16"})
    finally:
        LossScale.__init__.__defaults__ = defaults
    return found


# ---------------------------------------------------------------- main


def environment(args: argparse.Namespace) -> dict[str, Any]:
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "commit": commit.stdout.strip(), "device": args.device}
    found["liger"] = importlib.util.find_spec("liger_kernel") is not None
    if args.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(args.device)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return found


def all_good(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("good", True) is not False and all(all_good(item) for item in value.values())
    return True


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [" ".join(f"{key}={value}" for key, value in results["environment"].items()), ""]
    for section in ("kernels", "loss"):
        for name, found in results.get(section, {}).items():
            if isinstance(found, dict):
                errors = " ".join(f"{error:.1e}" for error in found.get("errors", []))
                verdict = "ok  " if found.get("good") else "FAIL"
                times = ", ".join(f"{key} {value}" for key, value in found.items() if key.endswith(("milliseconds", "peak_gib")))
                lines.append(f"{verdict} {section}: {name}: {errors or found.get('error', '')} ({times})")
    lines.append("")
    lines.append(f"{'training':28s} {'s/step':>8s} {'tokens/s':>9s} {'TFLOP/s':>8s} {'MFU':>6s} {'peak GiB':>9s} {'planned':>8s}")
    for name, found in results.get("training", {}).items():
        if not isinstance(found, dict) or "step_seconds" not in found:
            lines.append(f"{name:28s} {found.get('skipped') or found.get('error') if isinstance(found, dict) else found}")
            continue
        mfu = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
        lines.append(
            f"{name:28s} {found['step_seconds']:8.3f} {found['tokens_per_second']:9.0f} {found['tflops']:8.1f} {mfu:>6s} "
            f"{found['peak_gib']:9.1f} {found['planned_gib']:8.1f}"
        )
    lines.append(f"\nfp16: {json.dumps(results.get('fp16'))[:400]}")
    lines.append(f"{results['seconds']:.0f} s in all; {'all good' if results['good'] else 'NOT all good'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, on the CPU unless --device says otherwise")
    parser.add_argument("--device", help="default: cuda, with --tiny cpu")
    parser.add_argument("--length", type=int, help="tokens of a pack (8192)")
    parser.add_argument("--packs", type=int, help="packs of a step (4)")
    parser.add_argument("--samples", type=int, help="samples of a pack (16)")
    parser.add_argument("--steps", type=int, help="measured steps of a variant (6)")
    parser.add_argument("--budget-seconds", type=float, default=BUDGET_SECONDS)
    parser.add_argument("--only", choices=["kernels", "loss", "training", "fp16"])
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    args.device = args.device or ("cpu" if args.tiny else "cuda")
    defaults = (256, 2, 4, 2) if args.tiny else (8192, 4, 16, 6)
    for name, value in zip(("length", "packs", "samples", "steps"), defaults):
        setattr(args, name, getattr(args, name) or value)
    args.warm_steps = 1 if args.tiny else 2
    if args.device.startswith("cuda"):
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation
        if not torch.cuda.is_available():
            print("no CUDA device here; --tiny runs the same code on a CPU", file=sys.stderr)
            return 2
        args.device = f"cuda:{torch.cuda.current_device()}"
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    started = time.perf_counter()
    results: dict[str, Any] = {"environment": environment(args)}
    sections: dict[str, Callable[[], Any]] = {
        "kernels": lambda: check_kernels(args), "loss": lambda: check_loss(args),
        "training": lambda: check_training(args, started), "fp16": lambda: check_fp16(args),
    }  # fmt: skip
    for name, section in sections.items():
        if args.only in (None, name):
            try:
                results[name] = section()
            except Exception as error:  # the other sections still run
                results[name] = {"good": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
    results["seconds"] = time.perf_counter() - started
    results["good"] = all_good(results)
    text = json.dumps(results)
    if args.out:
        args.out.write_text(text + "\n")
    print(table(results))
    print(text)
    return 0 if results["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
