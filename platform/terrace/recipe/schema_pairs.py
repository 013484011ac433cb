"""Options of the objectives over pairs of a picture and its caption. Part of the schema."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from terrace.recipe.schema_inputs import Positive, Strict


class PairOptions(Strict):
    """Two towers over pairs of a picture and its caption (CLIP, SigLIP). LiT is a stage that does not train `vision`."""

    masked_patches: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the patches of every picture that training leaves out, drawn anew in every epoch (FLIP: 0.5)."
    )
    highest_scale: Positive = Field(100.0, description="The scale of similarities (1 / temperature) is held at or below this.")


class MatchingOptions(Strict):
    """BLIP-2's first stage: weights of its three losses over pairs of a picture and its caption."""

    itc: Annotated[float, Field(ge=0)] = Field(1.0, description="Weight of the contrast: each picture among the batch's texts, and back.")
    itm: Annotated[float, Field(ge=0)] = Field(1.0, description="Weight of the matching: a pair is told from two hard negatives.")
    itg: Annotated[float, Field(ge=0)] = Field(1.0, description="Weight of the writing: each token of the caption after those before it.")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="Label smoothing of contrast and writing.")
