"""What to change when a stage does not fit: the fewest changes, the cheapest first, written as overrides.

Candidates are combinations of: a strategy that shards more or gradients reduced at every pack (costs communication), activation
checkpointing (a third more compute), fewer rows of logits at once, the optimizer or the activations in host memory (slow), or else more
GPUs.
The first combination in this order of pain that fits is returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from terrace.planner.memory import Memory, PackSize, accumulates, gradients_reach, stage_memory
from terrace.planner.reduction import settled, with_reduction
from terrace.planner.shapes import ModelShape
from terrace.recipe.schema import PARTS, Stage

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
SMALL_CHUNK = 256
OFFLOADS: tuple[tuple[str, ...], ...] = ((), ("optimizer",), ("activations",), ("optimizer", "activations"))


@dataclass(frozen=True)
class Change:
    """`overrides` are relative to the stage (`parallel.strategy=zero3`); `workers` and `stage` are those afterwards."""

    overrides: list[str]
    workers: int
    stage: Stage
    memory: Memory | None = None  # once it is known to fit

    def describe(self, stage_name: str, workers_before: int) -> list[str]:
        lines = [f"stages.{stage_name}.{override}" for override in self.overrides]
        if self.workers != workers_before:
            lines.append(f"stages.{stage_name}.resources.workers={self.workers}")
        return lines


def nearest_changes(stage: Stage, shape: ModelShape, workers: int, pack: PackSize, limit: float) -> list[Change]:
    """The first change at the present number of GPUs that needs at most `limit` bytes on each, and the first with more.

    The second is left out where the first moves nothing to host memory. Empty: none of those tried fits.
    """
    present = _first(_candidates(stage, [workers], OFFLOADS), shape, pack, limit)
    if present is not None and not any("offload" in override for override in present.overrides):
        return [present]
    larger = _first(_candidates(stage, _larger_counts(stage, workers), OFFLOADS[:1]), shape, pack, limit)
    return [change for change in (present, larger) if change is not None]


def _first(candidates: Iterator[Change], shape: ModelShape, pack: PackSize, limit: float) -> Change | None:
    for change in candidates:
        memory = stage_memory(shape, settled(change.stage, shape, change.workers, pack, limit), change.workers, pack)
        if memory.total <= limit:
            return replace(change, memory=memory)
    return None


def _candidates(stage: Stage, counts: list[int], offloads: tuple[tuple[str, ...], ...]) -> Iterator[Change]:
    for count, offload, small_chunk, checkpointing in product(counts, offloads, (False, True), (False, True)):
        for strategy in _strategies(stage):
            changed, overrides = _changed(stage, strategy, checkpointing, small_chunk, offload)
            yield Change(overrides, count, changed)
            if stage.parallel.reduce_every_pack is False and accumulates(stage, count):
                yield Change([*overrides, "parallel.reduce_every_pack=true"], count, with_reduction(changed, True))


def _larger_counts(stage: Stage, workers: int) -> list[int]:
    """The next larger numbers of workers that the batch divides by, up to 64 times as many."""
    ring, packs = stage.parallel.sequence_parallel, stage.batch.packs
    return [ring * n for n in range(workers // ring + 1, min(packs, 64 * workers) + 1) if packs % n == 0]


def _strategies(stage: Stage) -> list[str]:
    present = stage.parallel.strategy
    if present not in STRATEGIES:
        return [present]
    return list(STRATEGIES[STRATEGIES.index(present) :])


def _changed(stage: Stage, strategy: str, checkpointing: bool, small_chunk: bool, offload: tuple[str, ...]) -> tuple[Stage, list[str]]:
    overrides: list[str] = []
    if checkpointing:
        train = {}
        for part in PARTS:
            training = getattr(stage.train, part)
            if training is not None and part != "projector" and not training.activation_checkpointing:
                train[part] = training.model_copy(update={"activation_checkpointing": True})
                overrides.append(f"train.{part}.activation_checkpointing=true")
        stage = stage.model_copy(update={"train": stage.train.model_copy(update=train)})
        frozen = any(gradients_reach(stage, part) and getattr(stage.train, part) is None for part in PARTS)
        if frozen and not stage.frozen_activation_checkpointing:
            stage = stage.model_copy(update={"frozen_activation_checkpointing": True})
            overrides.append("frozen_activation_checkpointing=true")
    if strategy != stage.parallel.strategy:
        stage = stage.model_copy(update={"parallel": stage.parallel.model_copy(update={"strategy": strategy})})
        overrides.append(f"parallel.strategy={strategy}")
    if small_chunk and stage.loss_chunk_tokens > SMALL_CHUNK:
        stage = stage.model_copy(update={"loss_chunk_tokens": SMALL_CHUNK})
        overrides.append(f"loss_chunk_tokens={SMALL_CHUNK}")
    if "optimizer" in offload and strategy != "ddp" and stage.parallel.offload_optimizer == "none":
        stage = stage.model_copy(update={"parallel": stage.parallel.model_copy(update={"offload_optimizer": "cpu"})})
        overrides.append("parallel.offload_optimizer=cpu")
    if "activations" in offload and not stage.activation_offload:
        stage = stage.model_copy(update={"activation_offload": True})
        overrides.append("activation_offload=true")
    return stage, overrides
