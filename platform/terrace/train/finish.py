"""The end of a stage: its final weights as a Hugging Face directory, and its result, whose file says that it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from terrace.models.export import KEPT_FILES, export_hf
from terrace.models.heads import FOLDER, without_heads, write_heads
from terrace.models.lora import merged, split, uses_lora, write_adapter
from terrace.models.precision import DTYPE_NAMES, DTYPES
from terrace.recipe.identity import start_index, taken_from
from terrace.recipe.rules_lora import keeps_adapters
from terrace.recipe.schema import PARTS, Model, Recipe, Stage
from terrace.recipe.stretches import last_stretch
from terrace.storage.durable import json_bytes, write_durably
from terrace.storage.files import absolute, join, read_file
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
    strategy: Strategy, recipe: Recipe, stage_index: int, config: Any, tokenizer_dir: Path | None, out_dir: Path,
    context: WorkerContext, storage: RunStorage, base: str | None = None,
) -> None:
    """Gather the whole weights on rank 0 (host memory: 4 bytes per parameter) and write them. All ranks call it.

    Adapters are merged; they also stand by themselves in `adapter/`, with the model they belong to in `adapter/base/` unless
    `base`, where the stage's weights come from, still is that model. The averaged weights, where the stage exports them, go to
    `final-ema/` first: `final/` says that all is there.
    """
    stage = recipe.stages[stage_index]
    state, end = {}, last_stretch(stage).pixels
    for name, tensor in strategy.tensors("weights"):
        if context.rank == 0:
            state[name] = tensor.detach().to("cpu", copy=True)
    averaged = dict(state)
    for name, tensor in strategy.tensors("average") if stage.ema is not None and stage.ema.export else ():
        if context.rank == 0:
            averaged[name] = tensor.detach().to("cpu", copy=True)
    if context.rank == 0:
        stored, kept = DTYPES[final_precision(recipe, stage_index)], kept_files(recipe.model.pretrained)
        trained, state = state, without_heads(state)
        how = (config, tokenizer_dir), ((end.min, end.max), DTYPE_NAMES[stage.precision], stored, kept)
        if stage.ema is not None and stage.ema.export:
            beside = out_dir.with_name(f"{out_dir.name}-ema")
            export_hf(dict(merged(strategy.model, without_heads(averaged).items())), *how[0], beside, *how[1])
            storage.publish_final(beside)
        export_hf(dict(merged(strategy.model, state.items())), *how[0], out_dir, *how[1])
        if uses_lora(stage):
            plain, adapters = split(state)
            if base is None:
                base = str(export_hf(plain, *how[0], out_dir / "adapter" / "base", *how[1]).absolute())
            write_adapter(strategy.model, adapters, base, out_dir / "adapter")
        if stage.train.heads is not None:
            write_heads(strategy.model, trained, out_dir / FOLDER)
        storage.publish_final(out_dir)
    barrier(context)


def unchanged_base(model: Model, stage: Stage, start_weights: Path | None) -> str | None:
    """The directory that holds the model beside which a stage's adapters were trained, if there is one: the stage starts from it
    and trains nothing else."""
    adapted = all((training := getattr(stage.train, part)) is None or training.lora is not None for part in PARTS)
    kept = any(keeps_adapters(stage))  # they were trained beside what an earlier stage started from
    if not adapted or kept:
        return None
    return str(start_weights.absolute()) if start_weights is not None else model.pretrained


def final_precision(recipe: Recipe, index: int) -> str:
    """The number format of a stage's `final/`: float32 where another stage starts from it, since rounding would move its start."""
    stage = recipe.stages[index]
    if stage.final_precision != "auto":
        return stage.final_precision
    later = range(index + 1, len(recipe.stages))
    followed = any(start_index(recipe, other) == index or index in taken_from(recipe, other).values() for other in later)
    return "fp32" if followed else stage.precision


def kept_files(pretrained: str | None) -> dict[str, bytes]:
    """What the checkpoint that a run starts from has beside its weights and stays as it is: those of `KEPT_FILES` that are there."""
    kept = {}
    for name in KEPT_FILES if pretrained is not None else ():
        with contextlib.suppress(FileNotFoundError):
            kept[name] = read_file(join(absolute(pretrained), name))
    return kept
