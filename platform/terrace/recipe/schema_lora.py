"""Low-rank adapters of a part: the part's own weights stay as they are, small matrices beside its linear layers train."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from terrace.recipe.schema_inputs import Positive, Strict


class Lora(Strict):
    """Each adapted layer W becomes W + scale B A, A of `rank` rows, B of `rank` columns and zero at first."""

    rank: int = Field(16, ge=1, le=4096, description="Rows of A and columns of B.")
    alpha: Positive = Field(32.0, description="The scale is alpha / rank.")
    targets: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Adapted linear layers by their last words (`q_proj`, `mlp.up_proj`); none named: every linear layer of the part's"
        " blocks (of the projector: every linear layer).",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout of what goes into A, while training only.")
    rank_stabilised: bool = Field(False, description="The scale is alpha / sqrt(rank) instead (rsLoRA).")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)
