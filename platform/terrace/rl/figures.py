"""Figures of an iteration, per task: tasks interfere in mixed training, so no mean over tasks stands alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrace.rewards.alarm import Form
from terrace.rl.advantages import zero_variance
from terrace.rl.collect import Group
from terrace.rl.pools import PASS_REWARD


def task_figures(groups: Sequence[Group]) -> dict[str, dict[str, float]]:
    """Per task, over every group that was rolled out (kept or not): the curves of the report."""
    figures = {}
    for task in sorted({group.task for group in groups}):
        mine = [group for group in groups if group.task == task]
        rewards = np.concatenate([group.rewards for group in mine])
        judged = rewards[np.isfinite(rewards)]
        responses = [response for group in mine for response in group.responses]
        lengths = np.asarray([len(response.sampled_tokens) for response in responses], np.float64)
        turns = [response.turns for response in responses if response.turns is not None]
        figures[task] = {
            "groups": float(len(mine)),
            "reward": float(judged.mean()) if len(judged) else 0.0,
            "pass_rate": float((judged >= PASS_REWARD).mean()) if len(judged) else 0.0,
            "zero_variance": float(np.mean([zero_variance(group.rewards) for group in mine])),
            "response_tokens": float(lengths.mean()),
            "truncated": float(np.mean([not response.finished for response in responses])),
            "reward_failures": float(1 - len(judged) / len(rewards)),
            # within a group: whether different samples of one prompt say different things
            "distinct": float(np.mean([group.distinct for group in mine])),
            **({"turns": float(np.mean(turns))} if turns else {}),
        }
    return figures


def mean_reward(figures: dict[str, dict[str, float]]) -> float:
    """Mean of the tasks' mean rewards."""
    return float(np.mean([one["reward"] for one in figures.values()])) if figures else 0.0


def form_of(figures: dict[str, float]) -> Form:
    """What the hacking alarm watches."""
    return Form(figures["reward"], figures["response_tokens"], figures["distinct"], figures["truncated"])


def past_forms(metrics_file: Path) -> dict[str, list[Form]]:
    """The history of every task from a stage's metrics, for an alarm that goes on after a restart."""
    history: dict[str, list[Form]] = {}
    if metrics_file.is_file():
        for line in metrics_file.read_text().split("\n"):
            for task, figures in (json.loads(line).get("tasks") or {}).items() if line else ():
                history.setdefault(task, []).append(form_of(figures))
    return history


def examples(groups: Sequence[Group], iteration: int) -> list[dict[str, Any]]:
    """The first group of each task, in words: its best and its worst response. Of groups that this rank has in words."""
    found: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for group in groups:
        if group.task in seen or not np.isfinite(group.rewards).any():
            continue
        seen.add(group.task)
        if not group.whole:
            continue
        best, worst = int(np.nanargmax(group.rewards)), int(np.nanargmin(group.rewards))
        found[group.task] = {
            "iteration": iteration,
            "task": group.task,
            "prompt": group.id,
            "question": group.question[-500:],
            "solution": group.solution[:200],
            "best": {"reward": float(group.rewards[best]), "text": group.texts[best][:1000]},
            "worst": {"reward": float(group.rewards[worst]), "text": group.texts[worst][:1000]},
        }
    return list(found.values())
