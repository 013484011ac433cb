"""A rank's packs, read, decoded and packed by Ray Data, in exact order, from any step.

Each rank runs its own small pipeline: one generator task reads, decodes and packs `packs_per_task` packs by itself, so
`preserve_order` costs nothing (770 samples/s on two cores; a read operator followed by a map operator drops to 300).
Arrays travel as bytes columns of Arrow blocks of about 64 MB, never as pickled objects. Ray moves the bytes and retries
dead workers; which packs a task makes was decided by the plan. `engine="inline"` does the same work in a thread here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from terrace.data.order.plan import StagePlan
from terrace.data.stream.inline import inline_packs
from terrace.data.stream.tasks import PackTask, TaskSettings, pack_task
from terrace.data.types import PackedExample, PackSpec
from terrace.errors import InputError

log = logging.getLogger(__name__)


Hand = Callable[[int], list[PackSpec]]  # step -> this rank's packs


@dataclass
class StepInput:
    """What one rank needs for one optimizer step."""

    step: int
    packs: list[PackedExample]  # this rank's packs of the step, in order
    wait_seconds: float  # how long the caller was kept waiting for them


def open_stream(
    plan: StagePlan, prepared: Any, rank: int, world_size: int, start_step: int = 0, engine: str | None = None,
    readers: int | None = None, hand: Hand | None = None,
) -> Iterator[StepInput]:
    """The rank's inputs of steps `start_step` to the stage's end. Close the iterator to stop early.

    `hand` gives the rank's packs of a step where another process deals them (`machine_plan`); the plan deals them otherwise.

    `readers` processes share the machine's decoders: more than `world_size` where several ranks take the same packs.

    `engine` is `ray` (an initialised Ray is needed) or `inline`; default: what the stage says. Raises DamagedData
    naming shard and sample, StorageError, or InputError when the batch cannot be dealt to this many workers.
    """
    engine = engine or plan.stage.data_loading.engine
    if plan.recipe is None:
        raise ValueError("a plan made from bare sources has no data to stream")
    settings = TaskSettings.of(plan.recipe, plan.stage_index, prepared)
    tasks = rank_tasks(plan, settings, hand or (lambda step: plan.deal(step, world_size)[rank]), start_step)
    if engine == "ray":
        from terrace.data.stream.ray_stream import ray_packs

        packs = ray_packs(tasks, settings, plan.stage, readers or world_size)
    elif engine == "inline":
        packs = inline_packs(tasks, settings, plan.stage.data_loading.prefetch_packs)
    else:
        raise InputError(f"stage {plan.stage.name}: data_loading.engine is {engine!r}; it is `ray` or `inline`")
    return _by_step(packs, plan, world_size, start_step)


def rank_tasks(plan: StagePlan, settings: TaskSettings, hand: Hand, start_step: int) -> Iterator[PackTask]:
    """The rank's packs from a step on, cut into decode tasks. Lazy: planning goes along with reading."""
    size = plan.stage.data_loading.packs_per_task
    waiting: list[Any] = []
    for step in range(start_step, plan.total_steps):
        waiting += hand(step)
        while len(waiting) >= size:
            yield pack_task(waiting[:size], settings, plan.spares)
            waiting = waiting[size:]
    if waiting:
        yield pack_task(waiting, settings, plan.spares)


def _by_step(packs: Iterator[PackedExample], plan: StagePlan, world_size: int, start_step: int) -> Iterator[StepInput]:
    """Group the packs by step, and check that each comes in its place."""
    per_step = plan.stage.batch.packs // world_size
    try:
        for step in range(start_step, plan.total_steps):
            begun = time.perf_counter()
            taken: list[PackedExample] = []
            while len(taken) < per_step:
                pack = next(packs, None)
                if pack is None or pack.pack // plan.stage.batch.packs != step:
                    found = "nothing" if pack is None else f"pack {pack.pack}"
                    raise RuntimeError(f"the data stream gave {found} where a pack of step {step} was due")
                taken.append(pack)
                if pack.damaged:
                    _tell_damage(pack)
            yield StepInput(step, taken, time.perf_counter() - begun)
    finally:
        packs.close()


def _tell_damage(pack: PackedExample) -> None:
    log.warning(
        "pack %d: %s could not be read; %d replaced by other samples of the source (`on_damage: skip`)",
        pack.pack, ", ".join(pack.damaged), pack.replaced,
    )  # fmt: skip
