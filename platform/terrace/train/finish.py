"""The end of a stage: its final weights as a Hugging Face directory, and its result, whose file says that it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from terrace.models.export import KEPT_FILES, ExportFiles
from terrace.models.heads import FOLDER, is_head, write_heads
from terrace.models.lora import is_adapter, merged, plain_name, sources_of, uses_lora, write_adapter
from terrace.models.precision import DTYPE_NAMES, DTYPES
from terrace.recipe.identity import start_index, taken_from
from terrace.recipe.rules_lora import keeps_adapters
from terrace.recipe.schema import PARTS, Model, Recipe, Stage
from terrace.recipe.stretches import last_stretch
from terrace.storage.durable import json_bytes, write_durably
from terrace.storage.files import absolute, join, read_file
from terrace.storage.run_storage import RunStorage
from terrace.train.export import export_together
from terrace.train.hand_over import HeldTensors
from terrace.train.strategies.interface import Strategy
from terrace.worker.collectives import barrier, gather_objects
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
    """Write the final weights, every rank its files (train.export). All ranks call it.

    Adapters are merged; they also stand by themselves in `adapter/`, with the model they belong to in `adapter/base/` unless
    `base`, where the stage's weights come from, still is that model. The averaged weights, where the stage exports them, go to
    `final-ema/` first: `final/` says that all is there. Adapters and heads alone come together on rank 0.
    """
    stage, model = recipe.stages[stage_index], strategy.model
    end = last_stretch(stage).pixels
    files = ExportFiles(
        config, tokenizer_dir, (end.min, end.max), DTYPE_NAMES[stage.precision], kept_files(recipe.model.pretrained)
    )
    held = HeldTensors(strategy.shards("weights"), context)
    names = [name for name, _ in model.named_parameters() if name in held.shapes]
    write = functools.partial(
        export_together, sources=sources_of(name for name in names if not is_head(name)), merge=functools.partial(merged, model),
        files=files, stored=DTYPES[final_precision(recipe, stage_index)], storage=storage,
    )
    if stage.ema is not None and stage.ema.export:
        beside = out_dir.with_name(f"{out_dir.name}-ema")
        write(_averaged(strategy, context), out_dir=beside)
        _publish(beside, context, storage)
    write(held, out_dir=out_dir)
    if uses_lora(stage):
        adapters = [name for name in names if is_adapter(name) and not is_head(name)]
        if base is None:
            plain = {plain_name(name): [name] for name in names if not is_adapter(name) and not is_head(name)}
            inside = out_dir / "adapter" / "base"
            base = str(write(held, sources=plain, merge=_plainly, out_dir=inside).absolute())
        for _, tensors in held.hand_over([(0, adapters)]):
            write_adapter(model, tensors, base, out_dir / "adapter")
    if stage.train.heads is not None:
        for _, tensors in held.hand_over([(0, [name for name in names if is_head(name)])]):
            write_heads(model, tensors, out_dir / FOLDER)
    _publish(out_dir, context, storage)


def _averaged(strategy: Strategy, context: WorkerContext) -> HeldTensors:
    """The averages of the weights that have one, and the others as they are."""
    averages = list(strategy.shards("average"))
    known = {name for found in gather_objects([shard.name for shard in averages], context) for name in found}
    rest = (shard for shard in strategy.shards("weights") if shard.name not in known)
    return HeldTensors([*averages, *rest], context)


def _plainly(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """What adapters stand beside, without them."""
    return ((plain_name(name), tensor) for name, tensor in tensors)


def _publish(folder: Path, context: WorkerContext, storage: RunStorage) -> None:
    if context.rank == 0:
        storage.publish_final(folder)
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
