"""The run directory's recipe: written at the start, compared with the one given on every later start.

The rule for a changed recipe: what has not started may change, what has started may not. In detail, a stage that has
not started may change in everything, and stages after the started ones may be added, removed or renamed. Of a stage
that has started, only what does not change its result may change: resources, parallel, checkpoint, failure, gates,
evaluate and the other keys that its hash leaves out. A data source may change or be added while no started stage uses
it. Tracking, description and notes may change. Everything else (name, model, tokenizer, the data seed, a started
stage) is refused, naming the keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from terrace.cluster.attempt_files import write_atomic
from terrace.curriculum.state import RunState
from terrace.errors import InputError
from terrace.recipe.identity import LAYOUT_KEYS, stage_hash
from terrace.recipe.loading import dump_recipe, load_recipe
from terrace.recipe.schema import Recipe
from terrace.storage.mirror import place_of

RECIPE_NAME = "recipe.yaml"
_FREE = {"description", "notes", "tracking"}
_FREE_STAGE = LAYOUT_KEYS | {"data_loading"}
_MISSING = object()


def stored_recipe(run_dir: Path) -> Recipe | None:
    """The recipe this run directory was started with, or last changed to."""
    path = Path(run_dir) / RECIPE_NAME
    return load_recipe(path) if path.is_file() else None


def require_run(run_dir: Path) -> Recipe:
    """The stored recipe; InputError where there is no run."""
    recipe = stored_recipe(run_dir)
    if recipe is None:
        place = place_of(run_dir)
        raise InputError(f"{place} is no run directory (no {RECIPE_NAME}); `terrace run RECIPE --run-dir {place}` starts one")
    return recipe


def store_recipe(run_dir: Path, recipe: Recipe) -> None:
    write_atomic(Path(run_dir) / RECIPE_NAME, dump_recipe(recipe))


def refuse_foreign_recipe(run_dir: Path) -> None:
    """Of a folder in which nothing has run yet: InputError where a recipe of the user's lies under the name of the run's own."""
    stored = stored_recipe(run_dir)
    if stored is not None and (Path(run_dir) / RECIPE_NAME).read_text(encoding="utf-8") != dump_recipe(stored):
        place = place_of(run_dir)
        raise InputError(f"{place}/{RECIPE_NAME} is a recipe of yours, and a run keeps its own under that name; use --run-dir {place}/run")


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Dotted keys whose values differ, in the recipe's order."""
    return _differences(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


def refused_changes(old: Recipe, new: Recipe, state: RunState) -> list[str]:
    """The changed keys that this run no longer allows."""
    started = [stage.index for stage in state.stages if stage.phase != "pending"]
    if not started:
        return [key for key in changed_keys(old, new) if key == "name"]
    count = max(started) + 1
    used = {source for index in range(count) for source in old.stages[index].mixture.weights}
    refused = [key for key in changed_keys(old, new) if not _allowed(key.split("."), count, used)]
    if not refused and len(new.stages) >= count:
        # The hashes decide; this finds what the list of keys above may have missed.
        refused = [f"stages.{index}" for index in range(count) if stage_hash(old, index) != stage_hash(new, index)]
    return refused


def check_changes(old: Recipe, new: Recipe, state: RunState, run_dir: Path) -> list[str]:
    """The changed keys, all allowed; InputError naming those that are not."""
    refused = refused_changes(old, new, state)
    if refused:
        shown = ", ".join(refused[:12]) + (f" and {len(refused) - 12} more" if len(refused) > 12 else "")
        raise InputError(
            f"{place_of(run_dir)} was started with another recipe; what has started cannot change, but these keys did: {shown}. "
            "Use another --run-dir, or add `--from STAGE` to run from that stage's beginning again."
        )
    return changed_keys(old, new)


def _allowed(key: list[str], started: int, used_sources: set[str]) -> bool:
    if key[0] in _FREE:
        return True
    if key[0] == "stages":
        if len(key) == 1:
            return False
        return int(key[1]) >= started or (len(key) > 2 and key[2] in _FREE_STAGE)
    if key[:2] == ["data", "sources"] and len(key) > 2:
        return key[2] not in used_sources
    return key[:2] == ["data", "storage"]


def _differences(old: Any, new: Any, prefix: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key, _MISSING), new.get(key, _MISSING)) for key in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list) and prefix == "stages":
        pairs = [
            (str(index), old[index] if index < len(old) else _MISSING, new[index] if index < len(new) else _MISSING)
            for index in range(max(len(old), len(new)))
        ]
    else:
        return [] if old == new else [prefix]
    return [key for name, before, after in pairs for key in _differences(before, after, f"{prefix}.{name}" if prefix else name)]
