"""The Ray Data side of the stream: tasks as a data source, arrays as bytes columns, a bounded share of the cluster.

The only file that imports ray.data for streaming. Every execution gets a DataContext of its own, so two datasets of one
process cannot change each other's order or limits.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset, Datasource, ExecutionResources

# Callbacks and policies of an execution have no public names yet.
from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, BackpressurePolicy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from terrace.data.stream.allocator import keep_freed_memory
from terrace.data.stream.inline import inline_packs
from terrace.data.stream.tasks import PackTask, TaskSettings, run_task
from terrace.data.types import PackedExample
from terrace.errors import TerraceError
from terrace.families.interface import Family
from terrace.recipe.schema import Stage

LOOP_PAUSE_SECONDS = 0.01
PIPELINE_TASKS = (64, 256)  # tasks of the first and every later execution; planning 64 takes 0.3 s, starting one 0.5 to 1 s
FIRST_PACKS = 32  # made by the training process at most: two seconds of a core at 8,192 tokens and 450 by 450 pixels
BLOCK_BYTES = 64 * 2**20  # larger blocks hold finished packs back, smaller ones cost a fixed 5 ms each
STORE_SHARE = 0.75  # of the object store, for all ranks together
AHEAD = "terrace.ahead"  # key of an execution's `Ahead`

# Field, dtype, shape behind the ragged axis. All arrays are C-contiguous.
_ARRAYS = (
    ("input_ids", np.int32), ("targets", np.int32), ("position_ids", np.int32), ("segment_ends", np.int32), ("pixels", np.uint8),
    ("image_facts", np.int32), ("image_tokens", np.int32), ("image_rows", np.int32), ("epochs", np.int32),
)  # fmt: skip
_NUMBERS = ("pack", "sequence_length", "replaced")
_LISTS = ("sample_ids", "sources", "kinds", "damaged")
SCHEMA = pa.schema(
    [(name, pa.int64()) for name in _NUMBERS]
    + [(name, pa.large_binary()) for name, _ in _ARRAYS]
    + [(name, pa.list_(pa.string())) for name in _LISTS]
)


def to_table(pack: PackedExample) -> pa.Table:
    """One pack as a row of bytes; the arrays are not copied (a tenth of a decode worker's time with pixels of 16 MB a pack)."""
    columns: dict[str, Any] = {name: [getattr(pack, name)] for name in _NUMBERS}
    for name, dtype in _ARRAYS:
        columns[name] = _bytes_column(np.ascontiguousarray(getattr(pack, name), dtype=dtype))
    for name in _LISTS:
        columns[name] = [list(getattr(pack, name))]
    return pa.table(columns, schema=SCHEMA)


def _bytes_column(array: np.ndarray) -> pa.Array:
    """A column of one row that holds the array's bytes."""
    ends = np.array([0, array.nbytes], np.int64)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(array.reshape(-1))])


def from_table(table: pa.Table, family: Family) -> Iterator[PackedExample]:
    """The packs of a block, in order. Arrays are copies: the block's memory is free once they are made."""
    columns = {"pixels": family.row_values, "image_facts": family.fact_count}
    for row in range(table.num_rows):
        values: dict[str, Any] = {}
        for name, dtype in _ARRAYS:
            flat = np.frombuffer(table[name][row].as_buffer(), dtype=dtype)
            shape = (-1, columns[name]) if name in columns else (family.position_rows, -1) if name == "position_ids" else (-1,)
            values[name] = flat.reshape(shape).copy()
        for name in (*_NUMBERS, *_LISTS):
            values[name] = table[name][row].as_py()
        values["damaged"] = tuple(values["damaged"])
        yield PackedExample(**values)


class CalmLoop(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest between its rounds.

    The loop runs in a thread of the training process and, whenever finished blocks wait for the trainer, it goes round
    without waiting for anything. Measured: it held the interpreter's lock 95 % of the time and made a small model's step
    three times as slow (0.20 s for 0.07 s). A hundred rounds a second are enough for blocks of many packs.
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(LOOP_PAUSE_SECONDS)


@dataclass(frozen=True)
class Ahead:
    """How far one rank's decode tasks may run ahead of its training."""

    cpus: float  # of each task
    at_once: int
    queued: int  # submitted while `at_once` run, so that a CPU that is done has its next task without asking
    task_bytes: int  # what the largest task makes
    store_bytes: int  # this rank's share of the object store

    @property
    def tasks(self) -> int:
        return self.at_once + self.queued

    def allows(self, active_tasks: int, waiting_bytes: int) -> bool:
        """Whether one more task may start: all of its blocks, the running tasks' and those that wait must have room."""
        limit = min(self.store_bytes, 2 * self.tasks * self.task_bytes)
        return active_tasks < self.tasks and waiting_bytes + (active_tasks + 1) * self.task_bytes <= limit


class AheadPolicy(BackpressurePolicy):
    """Ray Data's policies replaced by `Ahead`.

    Theirs compare what waits with what the consumer holds at the moment. A trainer that takes a block at once holds nothing, and
    every second task was held back (measured: half of each decode worker's time). Where nothing runs and the trainer
    waits, Ray Data starts a task whatever a policy says, so a store that is too small slows a stage but never stops it.
    """

    def can_add_input(self, op: Any) -> bool:
        manager = self._resource_manager
        waiting = manager.get_mem_op_outputs(op, include_ineligible_downstream=True) + manager.get_external_consumer_bytes()
        ahead: Ahead = self._data_context.get_config(AHEAD)
        return ahead.allows(op.num_active_tasks(), waiting)


class PackSource(Datasource):
    """Decode tasks as a Ray Data source: one read task each, in order."""

    def __init__(self, tasks: list[PackTask], settings: TaskSettings):
        super().__init__()
        self._tasks = tasks
        self._settings = settings.without_indexes()

    def get_name(self) -> str:
        return "Packs"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ReadTask]:
        return [_read_task(task, self._settings) for task in self._tasks]


def _read_task(task: PackTask, settings: TaskSettings) -> ReadTask:
    def read() -> Iterator[pa.Table]:
        keep_freed_memory()
        for pack in run_task(task, settings):
            yield to_table(pack)

    size = task_bytes(task, settings.collate.family.row_values)
    metadata = BlockMetadata(num_rows=len(task.parts), size_bytes=size, input_files=None, exec_stats=None)
    return ReadTask(read, metadata, schema=SCHEMA)


def task_bytes(task: PackTask, row_values: int) -> int:
    """Bytes of the task's packs: pixels, and 28 for a token's values."""
    return sum(part.spec.pixel_rows * row_values + sum(part.spec.lengths) * 28 for part in task.parts)


def ray_packs(
    tasks: Iterator[PackTask], settings: TaskSettings, stage: Stage, world_size: int
) -> Iterator[PackedExample]:
    """Packs of the tasks, in order: a first few made here, the others from one Ray Data execution after another.

    Until an execution's first block is there, 5 s pass: most of them its workers import torch, which this process has done. So the
    packs of the first step (`FIRST_PACKS` at most) are made in a thread here meanwhile. The first execution is short, so that training
    starts before much is planned; while one runs, a thread plans the next.
    """
    sizes = itertools.chain(PIPELINE_TASKS, itertools.repeat(PIPELINE_TASKS[-1]))
    loading = stage.data_loading
    packs_here = min(FIRST_PACKS, stage.batch.packs // world_size)
    here = list(itertools.islice(tasks, -(-packs_here // loading.packs_per_task)))
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="terrace-plan") as pool:
        some = list(itertools.islice(tasks, next(sizes)))
        made = inline_packs(iter(here), settings, loading.prefetch_packs)
        while some:
            blocks = _blocks(some, settings, stage, world_size)
            first = pool.submit(next, blocks, None)
            following = pool.submit(lambda: list(itertools.islice(tasks, next(sizes))))
            try:
                yield from made
                table = first.result()
                while table is not None:
                    yield from from_table(table, settings.collate.family)
                    table = next(blocks, None)
            except TerraceError:
                raise
            except Exception as error:
                cause = _terrace_error(error)
                if cause is None:
                    raise
                raise cause from None
            finally:
                made.close()
                wait([first])  # a generator that runs cannot be closed
                blocks.close()
            some = following.result()
        yield from made  # where a stage is that short; else it has ended


def _blocks(tasks: list[PackTask], settings: TaskSettings, stage: Stage, world_size: int) -> Iterator[pa.Table]:
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # otherwise six lines per execution, over the progress bars
    ahead = ahead_of(tasks, stage, world_size, settings.collate.family.row_values)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    context.op_resource_reservation_enabled = False
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [AheadPolicy])
    context.set_config(AHEAD, ahead)
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, CalmLoop]
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    limits = ExecutionResources(cpu=ahead.cpus * ahead.tasks, object_store_memory=ahead.store_bytes)
    context.execution_options.resource_limits = limits
    with DataContext.current(context):
        dataset: Dataset = ray.data.read_datasource(
            PackSource(tasks, settings), override_num_blocks=len(tasks), num_cpus=ahead.cpus, concurrency=min(ahead.tasks, len(tasks))
        )
    loading = stage.data_loading
    prefetch = max(1, loading.prefetch_packs // loading.packs_per_task)  # in blocks; a block holds at most a task's packs
    batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch))
    try:
        yield from batches
    finally:
        batches.close()


def ahead_of(tasks: list[PackTask], stage: Stage, world_size: int, row_values: int) -> Ahead:
    """Limits of one execution. A task that claims no CPU is never queued: nothing but the number of tasks would hold it back."""
    cpus, at_once = decode_share(stage, world_size)
    store = ray.cluster_resources().get("object_store_memory", 2**30) * STORE_SHARE / world_size
    return Ahead(cpus, at_once, int(cpus > 0), max(task_bytes(task, row_values) for task in tasks), int(store))


def decode_share(stage: Stage, world_size: int) -> tuple[float, int]:
    """(CPUs per decode task, tasks at once) of one rank: its share of what the training workers leave.

    Where they leave nothing, decoding still goes on, one task at a time and without a claim on a CPU: a stage that
    waits for ever for a free CPU would be worse than one that is a little slower.
    """
    total = ray.cluster_resources().get("CPU", 1.0)
    resources = stage.resources
    left = total - resources.cpus_per_worker * world_size
    free = left if resources.decode_cpus is None else float(resources.decode_cpus)
    share = free / world_size
    if share >= 1:
        return 1.0, int(share)
    return (round(share, 3) if share >= 0.1 else 0.0), 1


def _terrace_error(error: BaseException | None) -> TerraceError | None:
    """The error of a decode task inside Ray's wrappers."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, TerraceError) and type(error).__module__.startswith("terrace"):
            return error  # not Ray's class of the same base, whose text is a coloured trace
        error = getattr(error, "cause", None) or error.__cause__
        seen += 1
    return None
