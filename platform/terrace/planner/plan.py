"""The plan of a recipe: per stage and in total what it takes, whether it fits, and if not the nearest change that does.

    plan = make_plan(recipe, gpu="h100-80gb", gpus=256)

Pure arithmetic on the recipe: no torch, no data, milliseconds. Time is model FLOPs / (GPUs * peak * MFU), where MFU counts
neither activation recomputation nor data waits; both are in the MFU that was measured somewhere and stated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from terrace.planner.adapters import with_adapters
from terrace.planner.changes import Change, nearest_changes
from terrace.planner.data_facts import SourceFacts
from terrace.planner.experts import exchange_bytes
from terrace.planner.flops import PackFlops, training_flops
from terrace.planner.gpus import find_gpu, usable_bytes
from terrace.planner.memory import COMPUTE_BYTES, Memory, gradients_reach, optimizer_bytes, stage_memory, worst_pack
from terrace.planner.parameters import active_parameters, head_parameters, parameter_counts, trainable_counts, trained_parts
from terrace.planner.passes import passes_beside, rows_of_reference
from terrace.planner.reduction import reduces_every_pack, settled
from terrace.planner.rollouts import RolloutPlan, rollout_plan, settled_copy
from terrace.planner.shapes import stage_shape
from terrace.planner.work import Work, has_images, stage_work
from terrace.recipe.changes import stage_recipe
from terrace.recipe.schema import PARTS, Gpu, PartName, Recipe, Stage

WEIGHT_BYTES = 4  # checkpoints and final directories hold float32
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class StagePlan:
    name: str
    architecture: str
    stage: Stage
    workers: int
    gpus: int
    parameters: dict[PartName, int]
    active: dict[PartName, int]  # of them, those that one token meets
    trainable: dict[PartName, int]
    work: Work
    memory: Memory
    memory_checkpointed: Memory  # with activation checkpointing everywhere
    memory_kept: Memory  # with none
    pack_flops: PackFlops
    step_seconds: float
    reference_flops: float | None  # of the passes before the first step; None: unknown without an index
    reference_seconds: float | None
    usable_bytes: float
    checkpoint_bytes: float
    storage_bytes: float
    changes: list[Change]  # the nearest changes that fit, where the stage does not
    notes: list[str]
    rollouts: RolloutPlan | None = None  # of a stage that decodes

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable_bytes

    @property
    def flops(self) -> float | None:
        """Model FLOPs of the whole stage."""
        steps = self.work.steps
        return None if steps is None else self.pack_flops.model * self.stage.batch.packs * steps

    @property
    def hours(self) -> float | None:
        if self.work.steps is None or self.reference_seconds is None:
            return None
        return (self.work.steps * self.step_seconds + self.reference_seconds) / SECONDS_PER_HOUR

    @property
    def gpu_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.gpus

    @property
    def read_bytes_per_second(self) -> float:
        return self.work.pack_bytes * self.stage.batch.packs / self.step_seconds


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    gpu_name: str
    gpu: Gpu
    mfu: float
    price_per_gpu_hour: float
    stages: list[StagePlan]

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)


def make_plan(
    recipe: Recipe, gpu: str | None = None, gpus: int | None = None, mfu: float | None = None,
    price_per_gpu_hour: float | None = None, facts: Sequence[Mapping[str, SourceFacts]] | None = None,
) -> Plan:  # fmt: skip
    """The plan on `gpus` GPUs of a kind (default: what each stage's resources say). Raises InputError for unknown GPUs."""
    planning = recipe.planning
    gpu_name = gpu or planning.gpu
    found = find_gpu(gpu_name, planning)
    price = price_per_gpu_hour or found.price_per_hour or planning.price_per_gpu_hour
    share = mfu or planning.mfu
    stages = [
        _stage_plan(stage_recipe(recipe, index), stage, found, gpus, share, facts[index] if facts else {})
        for index, stage in enumerate(recipe.stages)
    ]
    return Plan(recipe, gpu_name, found, share, price, stages)


def workers_for(stage: Stage, gpus: int | None) -> int:
    """Workers of a stage on `gpus` GPUs: the most that its batch divides by; default: as many as its resources allow."""
    workers = stage.resources.workers
    per_worker = max(1.0, stage.resources.gpus_per_worker)
    wanted = max(1, int(gpus / per_worker)) if gpus is not None else workers if isinstance(workers, int) else workers[1]
    ring = stage.parallel.sequence_parallel
    counts = range(max(1, wanted // ring), 0, -1)
    fitting = (count for count in counts if stage.batch.packs % count == 0 and ring * count % stage.parallel.experts == 0)
    return ring * next(fitting, 1)


def _stage_plan(
    recipe: Recipe, stage: Stage, gpu: Gpu, gpus: int | None, mfu: float,
    facts: Mapping[str, SourceFacts],
) -> StagePlan:  # fmt: skip
    shape = with_adapters(stage_shape(recipe, stage), stage, recipe.model)
    workers = workers_for(stage, gpus)
    used = int(workers * max(1.0, stage.resources.gpus_per_worker))
    work = stage_work(recipe, stage, shape, facts)
    trained = trained_parts(stage)
    pack = worst_pack(stage, has_images(recipe, stage))
    limit = usable_bytes(gpu, recipe.planning)
    stage, asked = settled(stage, shape, workers, pack, limit), stage
    memory = stage_memory(shape, stage, workers, pack)
    stage = settled_copy(stage, shape, workers, memory, limit)
    flops = training_flops(shape, work.pack, trained, checkpointed_parts(stage))
    peak = gpu.bf16_tflops * 1e12 * (0.5 if stage.precision == "fp32" else 1.0)  # TF32 runs at half the rate of bf16
    forward, rate = sum(flops.forward.values()), used * peak * mfu
    parameters = parameter_counts(shape)
    everything = sum(parameters.values())
    checkpoint = WEIGHT_BYTES * (everything + head_parameters(shape, stage)) + optimizer_bytes(shape, stage)
    notes = []
    if reduces_every_pack(stage, workers):
        why = "whole ones do not fit" if asked.parallel.reduce_every_pack is None else "the recipe says so"
        notes.append(f"gradients are reduced at every pack: {why} (parallel.reduce_every_pack)")
    if stage.parallel.strategy == "fsdp" and (size := stage.parallel.hybrid_shard_size or workers) < workers:
        notes.append(
            f"hybrid sharding: {size} workers divide the weights, {workers // size} groups of them hold the same; gradients are scattered "
            "inside a group and then summed between groups (parallel.hybrid_shard_size)"
        )
    if stage.parallel.experts > 1:
        sent = exchange_bytes(shape, stage, workers, pack.tokens, COMPUTE_BYTES[stage.precision])
        notes.append(
            f"{stage.parallel.experts} workers share the experts: each sends about {sent / 2**30:.3g} GiB of tokens a step"
        )
    beside = passes_beside(recipe, stage, workers, work)
    rows = rows_of_reference(work) if beside.of_reference else 0.0
    reference = None if rows is None else beside.of_reference * forward * rows
    notes += beside.told
    if gpus is not None and used != gpus:
        notes.append(f"runs on {used} of {gpus} GPUs: its batch of {stage.batch.packs} packs must divide by the workers")
    if work.steps is None:
        notes.append("a budget in epochs needs the samples counted: --index counts them, or name prepared data with --data")
    rollouts = rollout_plan(shape, stage, gpu, workers, memory, limit) if stage.objective == "grpo" else None
    if rollouts is not None:
        notes += rollouts.notes
    if stage.rollout_workers:
        gpus_more = stage.rollout_workers * stage.resources.gpus_per_worker
        notes.append(f"{stage.rollout_workers} rollout workers ({gpus_more:g} GPUs) come on top of these")
    return StagePlan(
        name=stage.name,
        architecture=recipe.model.architecture,
        stage=stage,
        workers=workers,
        gpus=used,
        parameters=parameters,
        active=active_parameters(shape),
        trainable=trainable_counts(shape, stage),
        work=work,
        memory=memory,
        memory_checkpointed=stage_memory(shape, with_checkpointing(stage, True), workers, pack),
        memory_kept=stage_memory(shape, with_checkpointing(stage, False), workers, pack),
        pack_flops=flops,
        step_seconds=(flops.model + beside.in_step * forward) * stage.batch.packs / rate,
        reference_flops=reference,
        reference_seconds=None if reference is None else reference / rate,
        usable_bytes=limit,
        checkpoint_bytes=checkpoint,
        storage_bytes=checkpoint * _kept_checkpoints(stage, work.steps) + WEIGHT_BYTES * everything,
        changes=[] if memory.total <= limit else nearest_changes(asked, shape, workers, pack, limit),
        notes=notes,
        rollouts=rollouts,
    )


def checkpointed_parts(stage: Stage) -> list[PartName]:
    """Parts whose blocks are computed again in backward."""

    def recomputes(part: PartName) -> bool:
        training = getattr(stage.train, part)
        if training is not None:
            return training.activation_checkpointing
        return stage.frozen_activation_checkpointing and gradients_reach(stage, part)

    return [part for part in PARTS if part != "projector" and recomputes(part)]


def with_checkpointing(stage: Stage, on: bool) -> Stage:
    """The stage with activation checkpointing everywhere, or nowhere."""
    train = {
        part: training.model_copy(update={"activation_checkpointing": on})
        for part in PARTS
        if (training := getattr(stage.train, part)) is not None
    }
    return stage.model_copy(update={"train": stage.train.model_copy(update=train), "frozen_activation_checkpointing": on})


def _kept_checkpoints(stage: Stage, steps: int | None) -> int:
    checkpoint = stage.checkpoint
    kept = checkpoint.keep_last
    if checkpoint.every_steps is None:
        kept = 1
    if checkpoint.keep_every_steps is not None and steps is not None:
        kept += steps // checkpoint.keep_every_steps
    return kept
