"""What became of every draw of a stage without rounds: one line of `ledger.jsonl` for each iteration that was trained.

`draws` [first, behind the last] are those that the iteration decided; each is in exactly one of the lists: `trained` ([number, oldest and
newest weights that sampled its tokens]), `without_difference`, `unjudged`, `stale`, `damaged`, `unready`. Lines of iterations that a
resumed run does again are removed first, so the file tells the one history that the weights have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from terrace.rl.advantages import zero_variance
from terrace.rl.collect import Collected
from terrace.storage.durable import write_durably

FILE = "ledger.jsonl"


def fates(collected: Collected) -> dict[str, Any]:
    """The iteration's line, without what the loop knows. Empty where draws have no numbers."""
    if collected.draws is None:
        return {}
    trained = {group.drawn.occurrence for group in collected.kept}
    others = [group for group in collected.groups if group.drawn.occurrence not in trained]
    judged = [group for group in others if np.isfinite(group.rewards).sum() >= 2]
    return {
        "draws": list(collected.draws),
        "trained": [[group.drawn.occurrence, *group.ages] for group in collected.kept],
        "without_difference": [group.drawn.occurrence for group in judged if zero_variance(group.rewards)],
        "unjudged": [group.drawn.occurrence for group in others if np.isfinite(group.rewards).sum() < 2],
        "stale": [[group.drawn.occurrence, *group.ages] for group in collected.stale],
        "damaged": collected.damaged_draws,
        "unready": collected.unready_draws,
    }


def append(stage_dir: Path, line: dict[str, Any]) -> None:
    with open(stage_dir / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def forget_after(stage_dir: Path, step: int) -> None:
    """Remove the lines of later steps, which are done again, and one that was cut off."""
    path = stage_dir / FILE
    if path.is_file():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        write_durably(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= step).encode())


def read(stage_dir: Path) -> list[dict[str, Any]]:
    """All lines; none where the stage has rounds."""
    path = stage_dir / FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.is_file() else []
