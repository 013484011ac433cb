"""A stage's steps as Ray's own metrics: on the dashboard of the cluster, and wherever its Prometheus endpoints are scraped.

Names get `ray_` before them there (`ray_terrace_loss`). Rank 0 sets them, once per step, in this process's memory: Ray's agent of the
node takes them from there every few seconds, so a step costs no message.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

Observer = Callable[[str, dict[str, Any]], None]
GAUGES = {
    "terrace_step": "Optimizer steps that the stage has made.",
    "terrace_total_steps": "Optimizer steps that the stage will make.",
    "terrace_loss": "Loss of the newest step; steps whose loss is not finite leave it as it was.",
    "terrace_grad_norm": "Norm of the newest step's gradient, before clipping.",
    "terrace_tokens_per_second": "Tokens of the newest step over its seconds.",
    "terrace_data_wait_share": "Share of the newest step's seconds in which it waited for data.",
    "terrace_memory_peak_bytes": "The most that one process held in the newest step.",
    "terrace_reward": "Mean reward of a task in the newest iteration of reinforcement learning.",
    "terrace_held_out": "Newest held-out figure by name, as gates have it: a kind's loss, or a task's reward.",
}
_FROM_ROWS = {
    "terrace_step": "step", "terrace_loss": "loss", "terrace_grad_norm": "grad_norm", "terrace_tokens_per_second": "tokens_per_second",
    "terrace_memory_peak_bytes": "memory_peak_bytes",
}  # fmt: skip
LABELS = {"terrace_reward": "task", "terrace_held_out": "figure"}  # beside run and stage


def metrics_observer(run: str, stage: str) -> list[Observer]:
    """An observer for the stage in a list; an empty one where this process belongs to no Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return []
    from ray.util.metrics import Gauge

    common = {"run": run, "stage": stage}
    gauges = {}
    for name, description in GAUGES.items():
        labels = (*common, LABELS[name]) if name in LABELS else tuple(common)
        gauges[name] = Gauge(name, description=description, tag_keys=labels)
        gauges[name].set_default_tags(common)

    def observe(event: str, values: dict[str, Any]) -> None:
        for name, label, value in points(event, values):
            gauges[name].set(value, {LABELS[name]: label} if label else None)

    return [observe]


def points(event: str, values: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(gauge, its task or figure, value) of what a stage tells its observers."""
    found: list[tuple[str, str, Any]] = []
    if event == "started":
        found = [("terrace_total_steps", "", values["total_steps"]), ("terrace_step", "", values["step"])]
    elif event == "step":
        found = [(name, "", values.get(key)) for name, key in _FROM_ROWS.items()]
        if values.get("step_seconds"):
            found.append(("terrace_data_wait_share", "", values.get("data_wait_seconds", 0.0) / values["step_seconds"]))
        found += [("terrace_reward", task, figures.get("reward")) for task, figures in (values.get("tasks") or {}).items()]
    elif event == "evaluation":
        found = [("terrace_held_out", figure, value) for figure, value in (values["loss"] or {}).items()]
    return [(name, label, float(value)) for name, label, value in found if isinstance(value, int | float)]
