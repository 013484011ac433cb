"""What a curriculum has used, and whether `spec.limits` allows more. Pure.

GPU time counts while a RayJob has its quota, pods that end slowly included: from the first look at which it held GPUs to the first at
which it did not. Only these changes are kept in the status, so that counting costs no writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from terrace.cluster import manifests
from terrace.cluster.cluster_schema import CurriculumSpec, Limits
from terrace.curriculum.state import RunState
from terrace_operator import observe
from terrace_operator.codec import Memory
from terrace_operator.observe import World

SHOWN_EVERY_SECONDS = 600.0  # how often the figures in the status move while it runs
NEAR = 0.8  # of a limit: worth an event


@dataclass(frozen=True)
class Usage:
    gpu_hours: float
    wall_hours: float
    gpus: int = 0  # held now


def follow(spec: CurriculumSpec, memory: Memory, world: World, now: float) -> None:
    """Close the interval in which a number of GPUs was held when that number has changed."""
    held = held_gpus(spec, world)
    if held == memory.holding_gpus:
        return
    memory.gpu_seconds += round(_open(memory, now))
    memory.holding_gpus, memory.holding_since = held, now if held else None


def held_gpus(spec: CurriculumSpec, world: World) -> int:
    total = 0
    for job in world.rayjobs.values():
        index = int(job["metadata"].get("labels", {}).get(manifests.LABEL_STAGE, -1))
        holds = not observe.is_queued(job) and observe.status_of(job).get("jobDeploymentStatus") not in observe.ENDED
        if holds and 0 <= index < len(spec.recipe.stages):
            total += manifests.allocated_gpus(spec.recipe.stages[index], spec.runtime)
    return total


def _open(memory: Memory, now: float) -> float:
    return memory.holding_gpus * max(now - memory.holding_since, 0.0) if memory.holding_since is not None else 0.0


def used(state: RunState, memory: Memory, now: float) -> Usage:
    end = state.ended_at if state.ended_at is not None and state.phase in ("succeeded", "failed", "cancelled") else now
    wall = max(end - state.started_at, 0.0) if state.started_at is not None else 0.0
    return Usage((memory.gpu_seconds + _open(memory, now)) / 3600, wall / 3600, memory.holding_gpus)


def _against(limits: Limits, usage: Usage) -> list[tuple[str, float, float]]:
    """Name, used, allowed of each limit that is set."""
    price = limits.price_per_gpu_hour or 0.0
    rows = [("gpuHours", usage.gpu_hours, limits.gpu_hours), ("wallHours", usage.wall_hours, limits.wall_hours),
            ("cost", usage.gpu_hours * price, limits.cost)]  # fmt: skip
    return [(name, spent, allowed) for name, spent, allowed in rows if allowed is not None]


def reached(limits: Limits | None, usage: Usage) -> str | None:
    """Which limit is reached, in a sentence; None while none is."""
    return _sentence(limits, usage, 1.0, "is reached: everything is released after a checkpoint; a higher limit continues from there")


def near(limits: Limits | None, usage: Usage) -> str | None:
    """Which limit is four fifths spent."""
    return _sentence(limits, usage, NEAR, "is nearly reached; then it is suspended with a checkpoint")


def _sentence(limits: Limits | None, usage: Usage, share: float, what: str) -> str | None:
    for name, spent, allowed in _against(limits, usage) if limits else ():
        if spent >= allowed * share:
            return f"limits.{name} {allowed:g} {what} ({spent:.1f} used)"
    return None


def seconds_left(limits: Limits | None, usage: Usage) -> float | None:
    """Until the next limit, or the next four fifths of one, is reached at the present rate; None if never."""
    found = []
    for name, spent, allowed in _against(limits, usage) if limits else ():
        rate = 1.0 if name == "wallHours" else usage.gpus * ((limits.price_per_gpu_hour or 0.0) if name == "cost" else 1.0)
        found += [(mark - spent) / rate * 3600 for mark in (allowed * NEAR, allowed) if rate > 0 and mark > spent]
    return min(found, default=None)


def shown(limits: Limits | None, state: RunState, memory: Memory, now: float) -> dict[str, Any] | None:
    """The figures for the status, moved on only now and then while it runs; None where no limit asks for them."""
    if limits is None:
        return None
    usage = used(state, memory, now // SHOWN_EVERY_SECONDS * SHOWN_EVERY_SECONDS)
    figures = {"gpuHours": f"{usage.gpu_hours:.1f}", "wallHours": f"{usage.wall_hours:.1f}"}
    return figures | ({"cost": f"{usage.gpu_hours * limits.price_per_gpu_hour:.2f}"} if limits.price_per_gpu_hour else {})
