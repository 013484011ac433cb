"""What this machine has, and how a recipe's stages fit on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from terrace.begin.decide import Machine
from terrace.planner.plan import Plan, make_plan
from terrace.recipe.schema import Planning, Recipe

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")  # the first that fits; zero wants deepspeed


def this_machine() -> Machine:
    import psutil
    import torch

    from terrace.planner.gpus import gpu_of_device

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = None
    if gpus:
        found = torch.cuda.get_device_properties(0)
        name = gpu_of_device(found.name, found.total_memory, Planning())
    return Machine(gpus, name, float(psutil.virtual_memory().total), len(os.sched_getaffinity(0)))


def fitted(values: dict[str, Any], machine: Machine) -> tuple[dict[str, Any], Plan, list[tuple[str, str]]]:
    """The values with the distribution of each stage that fits this machine's GPUs, the plan, and what was decided."""
    if not machine.gpus:
        plan = make_plan(Recipe.model_validate(values))
        needed = max(stage.memory.total for stage in plan.stages)
        room = f"about {needed / 2**30:,.1f} GiB for a step, this machine has {machine.memory_bytes / 2**30:,.1f} GiB"
        if needed > 0.8 * machine.memory_bytes:
            room += ": TOO LITTLE; train it where there is a GPU"
        return values, plan, [("machine", f"one worker on {machine.cpus} CPUs; {room}")]
    import importlib.util

    strategies = [name for name in STRATEGIES if not name.startswith("zero") or importlib.util.find_spec("deepspeed")]
    if machine.gpus == 1:
        strategies = ["ddp"]
    gpu = machine.gpu_name
    told = [] if gpu else [("machine", f"{machine.gpus} GPUs that the planner's table does not have; the plan is for an h100-80gb")]
    for strategy in strategies:
        for recompute in (False, True):
            tried = _with(values, strategy, recompute)
            plan = make_plan(Recipe.model_validate(tried), gpu=gpu)
            if plan.fits:
                what = f"{strategy}" + (", recomputing activations" if recompute else "")
                return tried, plan, [*told, ("machine", f"{machine.gpus} x {plan.gpu_name}: {what} fits")]
    changes = [line for stage in plan.stages for change in stage.changes[:1] for line in change.describe(stage.name, stage.workers)]
    why = f"nothing fits on {machine.gpus} x {plan.gpu_name}" + (f"; try {' '.join(changes)}" if changes else "; it wants more GPUs")
    return tried, plan, [*told, ("machine", why)]


def _with(values: Mapping[str, Any], strategy: str, recompute: bool) -> dict[str, Any]:
    stages = []
    for stage in values["stages"]:
        less = {"activation_checkpointing": True} if recompute else {}
        train = {part: {**settings, **less} for part, settings in stage["train"].items()}
        more = {"frozen_activation_checkpointing": True} if recompute else {}
        stages.append({**stage, "train": train, **more, **({"parallel": {"strategy": strategy}} if strategy != "ddp" else {})})
    return {**values, "stages": stages}
