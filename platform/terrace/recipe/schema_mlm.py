"""Options of the objective mlm, which fills masked tokens. Part of the schema."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from terrace.recipe.schema_inputs import Strict


class MlmOptions(Strict):
    """Which tokens are to be told, and what the model reads in their places. The rest of both shares is read as it is (BERT: 0.1)."""

    share: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="Share of a sample's tokens that are to be told, at least one.")
    masked: Annotated[float, Field(ge=0, le=1)] = Field(0.8, description="Of those, the share that is read as the mask.")
    replaced: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="Of those, the share that is read as any other token.")
    whole_words: bool = Field(
        False, description="Take all tokens of a word or none; for tokenizers that mark where a word begins or goes on."
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.masked + self.replaced > 1:
            raise ValueError(f"masked {self.masked:g} and replaced {self.replaced:g} are more than 1 together")
        return self
