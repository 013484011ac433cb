"""The end of a stage: its final weights as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from terrace.models.export import export_hf
from terrace.recipe.schema import Stage
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
    barrier(context)
