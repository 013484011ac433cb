"""The end of a stage: its final weights as a Hugging Face directory, and its result, whose file says that it is complete."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from terrace.models.export import export_hf
from terrace.models.precision import DTYPE_NAMES
from terrace.recipe.schema import Stage
from terrace.storage.durable import json_bytes, write_durably
from terrace.storage.run_storage import RunStorage
from terrace.train.strategies.interface import Strategy
from terrace.worker.collectives import barrier
from terrace.worker.context import WorkerContext


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What `result.json` says: the file's presence means that the stage is complete."""

    steps: int
    loss: float | None  # of the last step
    evaluation: dict[str, dict[str, float]]  # before and after: held-out loss per kind
    tokens: int
    samples: int
    per_source: dict[str, int]
    seconds: float
    skipped_steps: int = 0
    unready_prompts: int = 0  # of a grpo stage: left out because its rewards cannot judge them
    suites: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # scores by suite of evaluate.suites


def read_result(stage_dir: Path) -> StageResult | None:
    """The result of a complete stage, or None."""
    file = stage_dir / "result.json"
    return StageResult(**json.loads(file.read_text())) if file.is_file() else None


def write_result(stage_dir: Path, result: StageResult, context: WorkerContext) -> None:
    """Make the stage complete. All ranks call it; none returns before the file is there."""
    if context.rank == 0:
        write_durably(stage_dir / "result.json", json_bytes(dataclasses.asdict(result)))
    barrier(context)


def export_final(
    strategy: Strategy, stage: Stage, config: Any, tokenizer_dir: Path | None, out_dir: Path, context: WorkerContext,
    storage: RunStorage,
) -> None:
    """Gather the whole weights on rank 0 (host memory: 4 bytes per parameter) and write them. All ranks call it.

    The averaged weights, where the stage is to export them, go to `final-ema/` beside it, first: `final/` says that all is there."""
    state = {}
    for name, tensor in strategy.tensors("weights"):
        if context.rank == 0:
            state[name] = tensor.detach().to("cpu", copy=True)
    if stage.ema is not None and stage.ema.export:
        averaged = dict(state)
        for name, tensor in strategy.tensors("average"):
            if context.rank == 0:
                averaged[name] = tensor.detach().to("cpu", copy=True)
        if context.rank == 0:
            beside = out_dir.with_name(f"{out_dir.name}-ema")
            export_hf(averaged, config, tokenizer_dir, beside, (stage.pixels.min, stage.pixels.max), DTYPE_NAMES[stage.precision])
            storage.publish_final(beside)
    if context.rank == 0:
        pixels = (stage.pixels.min, stage.pixels.max)
        export_hf(state, config, tokenizer_dir, out_dir, pixels, DTYPE_NAMES[stage.precision])
        storage.publish_final(out_dir)
    barrier(context)
