"""Where a stage lies in its run directory, and which weights it starts from."""

from __future__ import annotations

from pathlib import Path

from terrace.errors import InputError
from terrace.recipe.schema import Recipe
from terrace.storage.run_storage import RunStorage


def stage_folder(recipe: Recipe, stage_index: int, run_dir: Path) -> Path:
    """`<run-dir>/stages/<NN>-<name>`, NN from 01."""
    return run_dir / "stages" / f"{stage_index + 1:02d}-{recipe.stages[stage_index].name}"


def start_weights_of(recipe: Recipe, stage_index: int, run_dir: Path, storage: RunStorage) -> Path | None:
    """The `final/` directory of the stage that this one starts from; None for the first: the recipe's own weights.

    Raises InputError if that stage has not finished.
    """
    wanted = recipe.stages[stage_index].start_from
    names = [stage.name for stage in recipe.stages]
    if wanted is None and stage_index == 0:
        return None
    if wanted is not None and wanted not in names:
        raise InputError(f"stage {names[stage_index]}: start_from names {wanted}, which is no stage of the recipe")
    before = names.index(wanted) if wanted is not None else stage_index - 1
    final = stage_folder(recipe, before, run_dir) / "final"
    storage.fetch_final(final)
    if not (final / "config.json").is_file():
        raise InputError(
            f"stage {names[stage_index]} starts from {names[before]}, which has no finished weights in {final}"
        )
    return final
