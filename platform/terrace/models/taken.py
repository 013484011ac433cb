"""What the stages of a recipe take of each other, compared by tensor before the first of them runs.

The same code that will read the weights (models.weights) reads directories that do not exist yet, whose tensors are those of the
earlier stage's model on the meta device. So a tower that does not fit is refused in seconds, not after a stage of days.
"""

from __future__ import annotations

from typing import Any

import torch

from terrace.errors import InputError
from terrace.models.build import meta_model, planned_config
from terrace.models.families.interface import FamilyModel
from terrace.models.families.registry import family_of_model
from terrace.models.tensor_files import Directory
from terrace.models.weights import compared_weights
from terrace.recipe.changes import stage_recipe
from terrace.recipe.identity import taken_from
from terrace.recipe.schema import Recipe
from terrace.recipe.schema_model import FROM_STAGE


class MetaFile:
    """Tensors that have a name and a shape and no content yet."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} is not there before its stage has run")


class PlannedDirectory(Directory):
    """The `final/` that a stage will leave."""

    def __init__(self, stage: str, config: Any, family: FamilyModel) -> None:
        self.path = f"the end of stage {stage}"
        self.__dict__["config"] = config.to_dict()  # in place of the cached property
        skeleton = meta_model(config)
        writer = family_of_model(skeleton)
        stored = {name: piece for own, tensor in skeleton.named_parameters() for name, piece in writer.stored(own, tensor.data).items()}
        self._hold([MetaFile({name: tuple(piece.shape) for name, piece in stored.items()})], family)


def check_taken(recipe: Recipe) -> None:
    """Raises InputError, with the stage and every tensor by name, where a stage cannot begin with what it takes of earlier ones."""
    for index, stage in enumerate(recipe.stages):
        taken = taken_from(recipe, index)
        if not taken:
            continue
        model = stage_recipe(recipe, index).model
        elsewhere = {part: "random" for part in ("vision", "projector", "language") if part not in taken}  # looked at when it is read

        def opened(place: str, family: FamilyModel) -> Directory:
            name = place.removeprefix(FROM_STAGE)
            before = next(number for number, one in enumerate(recipe.stages) if one.name == name)
            return PlannedDirectory(name, planned_config(stage_recipe(recipe, before)), family)

        skeleton = meta_model(planned_config(stage_recipe(recipe, index)))
        try:
            compared_weights(model.with_places(elsewhere), skeleton, None, stage.model_changes, opened)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from error
