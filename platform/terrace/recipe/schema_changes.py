"""What becomes of the model between two stages (`stages[].model_changes`), beyond its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from terrace.recipe.schema_inputs import Positive, Strict


class Upcycle(Strict):
    """Dense feed-forward layers of the language model become mixtures of experts that begin as copies of them (MoE-LLaVA)."""

    experts: int = Field(4, ge=2, description="Experts of a sparse layer, each a copy of the dense feed-forward.")
    per_token: int = Field(2, ge=1, description="Experts that a token goes to.")
    layers: Literal["every_second", "all"] = Field("every_second", description="Which layers become sparse: the 1st, 3rd, ..., or all.")
    capacity_factor: Positive | None = Field(
        None,
        description="In training an expert takes at most this times its even share of a pack's assignments; what is beyond passes by and is"
        " counted. Unset: nothing is left out, and losses do not depend on how samples are packed.",
    )
    auxiliary_loss: Annotated[float, Field(ge=0)] = Field(
        0.01, description="Weight of the load-balancing loss from now on (`expert_balance` of a stage overrides it)."
    )


class ModelChanges(Strict):
    """Made to the weights that the stage starts from; the stages after it go on with the changed model."""

    interpolate_positions: int | None = Field(
        None, ge=1, description="Side in pixels of the squares that the tower sees from now on: its learned positions are stretched"
        " over the new grid (bicubic).",
    )  # fmt: skip
    rope_base: Positive | None = Field(None, description="Base of the language model's rotary positions from now on (long context).")
    add_tokens: int | None = Field(
        None, ge=1, description="Rows that embedding and output layer get behind their vocabulary, each beginning as the mean of those that"
        " are there: for tokens that the tokenizer has beyond the start's.",
    )  # fmt: skip
    upcycle: Upcycle | None = Field(None, description="Dense feed-forward layers become mixtures of experts.")
