"""Which weights a stage starts from."""

from __future__ import annotations

from pathlib import Path

from terrace.errors import InputError
from terrace.recipe.schema import Recipe
from terrace.storage.run_layout import stage_directory
from terrace.storage.run_storage import RunStorage


def start_weights_of(recipe: Recipe, stage_index: int, run_dir: Path, storage: RunStorage) -> Path | None:
    """The `final/` directory of the stage that this one starts from; None for the first: the recipe's own weights. Of a run on S3 its
    tensors stay there: each rank reads what it will hold.

    Raises InputError if that stage has not finished.
    """
    wanted = recipe.stages[stage_index].start_from
    names = [stage.name for stage in recipe.stages]
    if wanted is None and stage_index == 0:
        return None
    if wanted is not None and wanted not in names:
        raise InputError(f"stage {names[stage_index]}: start_from names {wanted}, which is no stage of the recipe")
    before = names.index(wanted) if wanted is not None else stage_index - 1
    final = stage_directory(run_dir, before, names[before]) / "final"
    storage.fetch_final(final, tensors=False)
    if not (final / "config.json").is_file():
        raise InputError(
            f"stage {names[stage_index]} starts from {names[before]}, which has no finished weights in {final}"
        )
    return final
