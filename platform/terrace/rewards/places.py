"""Where the judges of a curriculum lie: options of rewards that name an earlier stage, with its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from terrace.recipe.schema import Recipe
from terrace.recipe.schema_grpo import RewardRule
from terrace.recipe.schema_model import FROM_STAGE
from terrace.storage.run_layout import stage_directory


def settled(rewards: Mapping[str, Sequence[RewardRule]], recipe: Recipe, stages: Path) -> dict[str, list[RewardRule]]:
    """A stage's reward rules with the folder of each stage that an option names (`stage:NAME`); `stages` is the run's folder of stages."""
    names = [stage.name for stage in recipe.stages]

    def place(value: Any) -> Any:
        if not isinstance(value, str) or not value.startswith(FROM_STAGE):
            return value
        name = value.removeprefix(FROM_STAGE)
        return str(stage_directory(stages.parent, names.index(name), name) / "final")

    return {
        task: [rule.model_copy(update={"options": {key: place(value) for key, value in rule.options.items()}}) for rule in rules]
        for task, rules in rewards.items()
    }
