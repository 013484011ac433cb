"""The demo's figures as one file, `summary.json`, and as the lines of Markdown that the project's own pages show of it.

A page never holds a number of the demo that this module did not write: a test compares them.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from terrace.demo.along import Clock
from terrace.demo.results import RL_TASKS, TASKS, Results

MARGIN = 4  # of about 40 questions of a kind: so many answers may an RL stage cost before it counts as a loss


def summary_of(results: Results, clock: Clock | None, first_shown_seconds: float | None) -> dict[str, Any]:
    """`clock` None: the demo was continued or shown again, so its time is not known."""
    return {
        "name": results.name,
        "parameters": results.parameters,
        "seconds": round(clock.seconds, 1) if clock else None,
        "cpu_seconds": round(clock.cpu_seconds, 1) if clock else None,
        "first_answers_seconds": round(first_shown_seconds, 1) if clock and first_shown_seconds else None,
        "right": results.right,
        "asked": results.asked,
        "stages": [
            {
                "name": stage.name,
                "steps": stage.steps,
                "tokens": stage.tokens,
                "seconds": round(stage.seconds, 1),
                "right": {kind: list(pair) for kind, pair in results.stage_scores.get(stage.name, {}).items()},
                ("reward" if stage.is_rl else "loss"): {
                    name: [round(stage.before[name], 3) if name in stage.before else None, round(value, 3)]
                    for name, value in stage.after.items()
                },
                **({"greedy_reward": {name: [round(v, 3) for v in pair] for name, pair in stage.greedy.items()}} if stage.is_rl else {}),
            }
            for stage in results.stages
        ],
    }


def write_summary(summary: dict[str, Any], run_dir: Path) -> Path:
    path = run_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return path


def losses_table(summary: dict[str, Any]) -> str:
    """Held-out loss before and after each supervised stage, as a Markdown table."""
    stages = [stage for stage in summary["stages"] if "loss" in stage]
    kinds = [kind for kind in (*TASKS, "text") if any(kind in stage["loss"] for stage in stages)]
    head = ["kind", *(f"{number} {stage['name']}" for number, stage in enumerate(stages, start=1))]
    return _table(head, [[kind, *(_change(stage["loss"].get(kind)) for stage in stages)] for kind in kinds])


def answers_table(summary: dict[str, Any]) -> str:
    """Right answers to held-out questions after every stage, as a Markdown table."""
    stages = [stage for stage in summary["stages"] if stage["right"]]
    kinds = list(stages[-1]["right"])
    head = ["task", "questions", *(f"{number} {stage['name']}" for number, stage in enumerate(stages, start=1))]
    rows = [[TASKS[kind], str(stages[-1]["right"][kind][1]), *(str(stage["right"][kind][0]) for stage in stages)] for kind in kinds]
    rows.append(["all", str(summary["asked"]), *(str(sum(right for right, _ in stage["right"].values())) for stage in stages)])
    return _table(head, rows)


def rewards_table(summary: dict[str, Any]) -> str:
    """Mean reward of held-out prompts before and after every RL stage, as a Markdown table."""
    stages = [stage for stage in summary["stages"] if "reward" in stage]
    rows = [
        [RL_TASKS.get(task, task), _change(values), _change(stage["greedy_reward"].get(task))]
        for stage in stages
        for task, values in stage["reward"].items()
    ]
    return _table(["task", "sampled answers", "greedy answer"], rows)


def fell_in_rl(summary: dict[str, Any], margin: int = MARGIN) -> dict[str, tuple[int, int]]:
    """Kinds with more than `margin` fewer right answers after an RL stage than before it: (before, after) of each."""
    stages, found = summary["stages"], {}
    for before, stage in itertools.pairwise(stages):
        if "reward" in stage:
            pairs = {kind: (before["right"][kind][0], right) for kind, (right, _) in stage["right"].items()}
            found |= {kind: pair for kind, pair in pairs.items() if pair[1] < pair[0] - margin}
    return found


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _change(pair: list[float | None] | None) -> str:
    if pair is None:
        return ""
    before, after = pair
    return f"{after:.3f}" if before is None else f"{before:.3f} -> {after:.3f}"


def in_words(summary: dict[str, Any]) -> str:
    """One sentence: how many answers are right, how large the model is and what it took."""
    share = 100 * summary["right"] / max(1, summary["asked"])
    parts = [f"{summary['right']} of {summary['asked']} held-out questions right ({share:.0f} %)"]
    parts.append(f"{summary['parameters']:,} parameters")
    if summary["seconds"] is not None:
        parts.append(f"{summary['seconds'] / 60:.1f} minutes, {summary['cpu_seconds'] / 60:.1f} minutes of CPU")
    if summary["first_answers_seconds"] is not None:
        parts.append(f"first answers after {summary['first_answers_seconds']:.0f} seconds")
    return "; ".join(parts) + "."
