"""Which weights a stage starts from."""

from __future__ import annotations

from pathlib import Path

from terrace.errors import InputError
from terrace.recipe.identity import judges_of, start_index, taken_from
from terrace.recipe.schema import Recipe
from terrace.storage.run_layout import stage_directory
from terrace.storage.run_storage import RunStorage


def start_weights_of(recipe: Recipe, stage_index: int, run_dir: Path, storage: RunStorage) -> Path | None:
    """The `final/` directory of the stage that this one starts from; None for the first: the recipe's own weights. Of a run on S3 its
    tensors stay there: each rank reads what it will hold.

    Also None for a stage with a model of its own (`with_taken_parts`). Raises InputError if that stage has not finished.
    """
    wanted = recipe.stages[stage_index].start_from
    names = [stage.name for stage in recipe.stages]
    if wanted is not None and wanted not in names:
        raise InputError(f"stage {names[stage_index]}: start_from names {wanted}, which is no stage of the recipe")
    before = start_index(recipe, stage_index)
    return None if before is None else _final(recipe, stage_index, before, run_dir, storage)


def with_taken_parts(recipe: Recipe, stage_index: int, run_dir: Path, storage: RunStorage) -> Recipe:
    """A stage's recipe (recipe.changes.stage_recipe) with the `final/` directories of the stages that its own model takes parts of.
    Those that judge its answers are there as well, or it raises InputError."""
    for judge in judges_of(recipe, stage_index).values():
        _final(recipe, stage_index, judge, run_dir, storage, tensors=True)
    taken = taken_from(recipe, stage_index)
    if not taken:
        return recipe
    places = {part: str(_final(recipe, stage_index, before, run_dir, storage)) for part, before in taken.items()}
    return recipe.model_copy(update={"model": recipe.model.with_places(places)})


def _final(recipe: Recipe, stage_index: int, before: int, run_dir: Path, storage: RunStorage, tensors: bool = False) -> Path:
    names = [stage.name for stage in recipe.stages]
    final = stage_directory(run_dir, before, names[before]) / "final"
    storage.fetch_final(final, tensors)
    if not (final / "config.json").is_file():
        raise InputError(
            f"stage {names[stage_index]} needs {names[before]}, which has no finished weights in {final}"
        )
    return final
