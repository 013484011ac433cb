"""What becomes of the model between two stages (`stages[].model_changes`), beyond its training."""

from __future__ import annotations

from pydantic import Field

from terrace.recipe.schema_inputs import Positive, Strict


class ModelChanges(Strict):
    """Made to the weights that the stage starts from; the stages after it go on with the changed model."""

    interpolate_positions: int | None = Field(
        None, ge=1, description="Side in pixels of the squares that the tower sees from now on: its learned positions are stretched"
        " over the new grid (bicubic).",
    )  # fmt: skip
    rope_base: Positive | None = Field(None, description="Base of the language model's rotary positions from now on (long context).")
