"""The hashes that identify a run and its stages: what a recipe says, however it is written.

Only what differs from the schema's defaults is hashed, so a field that the schema gets later moves no hash of runs that do not use it.
In return a default never changes its meaning: `tests/unit/recipe_defaults.json` holds those that runs rest on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from terrace.recipe.schema import PARTS, Recipe, Stage
from terrace.recipe.schema_inputs import REMEDIES
from terrace.recipe.schema_model import FROM_STAGE

# What changes where and how fast a stage runs but not what it computes (up to rounding): absent from its hash, so that
# a run may resume with other workers, another strategy or other checkpoint intervals.
LAYOUT_KEYS = {
    "after",
    "resources",
    "parallel",
    "checkpoint",
    "failure",
    "gates",
    "evaluate",
    "profile",
    "activation_offload",
    "frozen_activation_checkpointing",
    "loss_chunk_tokens",
    "gradient_noise",
}
_LAYOUT_KEYS_INSIDE = {
    "train": {part: {"activation_checkpointing"} for part in PARTS},
    "grpo": {"compile_decoding", "placement", "rollout_workers", "evaluation_samples", "max_reward_failure_rate", "max_logprob_mismatch"},
    "data_loading": {"prefetch_packs", "packs_per_task", "engine"},
}
_MODEL_LAYOUT_KEYS = {"attention", "kernels", "stands_in_for", "connector"}  # `written` holds the connector


def recipe_hash(recipe: Recipe) -> str:
    """sha256 (hex) of what a recipe says of its run, however it was written (order of keys, 1e3 or 1000, extends)."""
    written = recipe.model_copy(update={"model": recipe.model.written})
    return _digest(written.model_dump(mode="json", exclude={"planning", "notes", "recaption"}, exclude_defaults=True))


def stage_hash(recipe: Recipe, index: int) -> str:
    """sha256 (hex) of what determines a stage's weights: model, tokenizer, its sources, itself, the stages before.

    A checkpoint of the stage may be continued only under the same hash.
    """
    stage = recipe.stages[index]
    before = start_index(recipe, index)
    taken = {key: stage_hash(recipe, place) for key, place in {**taken_from(recipe, index), **judges_of(recipe, index)}.items()}
    return _digest(
        {
            "model": recipe.model.written.model_dump(mode="json", exclude=_MODEL_LAYOUT_KEYS, exclude_defaults=True),
            "tokenizer": recipe.tokenizer.model_dump(mode="json", exclude_defaults=True),
            "data_seed": recipe.data.seed,
            "sources": {
                name: recipe.data.sources[name].model_dump(mode="json", exclude=REMEDIES, exclude_defaults=True)
                for name in stage.mixture.weights
            },
            "stage": _stage_settings(stage),
            "before": None if before is None else stage_hash(recipe, before),
        }
        | ({"taken": taken} if taken else {})
    )


def start_index(recipe: Recipe, index: int) -> int | None:
    """Index of the stage whose final weights stage `index` starts from as a whole; None: the initial weights of its model."""
    start = recipe.stages[index].start_from
    if recipe.stages[index].model is not None:
        return None
    if start is None:
        return index - 1 if index else None
    return next(place for place, stage in enumerate(recipe.stages) if stage.name == start)


def taken_from(recipe: Recipe, index: int) -> dict[str, int]:
    """Part -> index of the earlier stage whose final weights it begins with, of a stage that brings a model of its own."""
    model, names = recipe.stages[index].model, [stage.name for stage in recipe.stages]
    if model is None or model.init is None:
        return {}
    return {part: names.index(name) for part, name in model.init.stages().items()}


def judges_of(recipe: Recipe, index: int) -> dict[str, int]:
    """Name -> index of the stages whose final weights judge the answers of a stage."""
    names = [stage.name for stage in recipe.stages]
    return {name: names.index(name) for name in judge_names(recipe.stages[index]) if name in names}


def judge_names(stage: Stage) -> list[str]:
    """The stages that options of its rewards name (`stage:NAME`)."""
    values = [value for rules in stage.rewards.values() for rule in rules for value in rule.options.values()]
    named = [value.removeprefix(FROM_STAGE) for value in values if isinstance(value, str) and value.startswith(FROM_STAGE)]
    return list(dict.fromkeys(named))


def _stage_settings(stage: Stage) -> dict[str, Any]:
    exclude: Any = {**dict.fromkeys(LAYOUT_KEYS, True), **_LAYOUT_KEYS_INSIDE}
    if stage.model is not None:
        exclude["model"] = _MODEL_LAYOUT_KEYS
    settings = stage.model_dump(mode="json", exclude=exclude, exclude_defaults=True)
    return {key: value for key, value in settings.items() if value != {} or key not in ("data_loading", "grpo")}


def _digest(value: Any) -> str:
    canonical = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """Whole floats as integers everywhere, so that 1e3, 1000 and 1000.0 are one number."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
