"""The end of a stage: its final weights as a Hugging Face directory, and the suites that the recipe asks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from terrace.models.export import export_hf
from terrace.recipe.schema import Stage
from terrace.storage import mirror
from terrace.train.collectives import barrier
from terrace.train.context import WorkerContext
from terrace.train.strategies.interface import Strategy

EXPORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export_final(
    strategy: Strategy, stage: Stage, config: Any, tokenizer_dir: Path | None, out_dir: Path, context: WorkerContext
) -> None:
    """Gather the whole weights on rank 0 (host memory: 4 bytes per parameter) and write them. All ranks call it."""
    state = {}
    for name, tensor in strategy.tensors("weights"):
        if context.rank == 0:
            state[name] = tensor.detach().to("cpu", copy=True)
    if context.rank == 0:
        pixels = (stage.pixels.min, stage.pixels.max)
        export_hf(state, config, tokenizer_dir, out_dir, pixels, EXPORT_DTYPES[stage.precision])
        mirror.store_folder(out_dir, mirror.FINAL_LAST)
    barrier(context)


def check_suites(stage: Stage) -> None:
    """Raises InputError for a suite that cannot be asked, before the stage spends anything."""
    if stage.evaluate.suites:
        from terrace.evaluate.suites import parse_suite

        for text in stage.evaluate.suites:
            parse_suite(text)


def ask_suites(stage: Stage, stage_dir: Path, context: WorkerContext) -> dict[str, dict[str, float]]:
    """Scores by suite of `stage_dir/final`. All ranks call it, without holding on to what they trained with."""
    if not stage.evaluate.suites:
        return {}
    from terrace.evaluate.stage import evaluate_final  # a loop without suites needs none of the judges' libraries

    return evaluate_final(stage, stage_dir, context)
