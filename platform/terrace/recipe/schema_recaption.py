"""`recaption:` of a recipe: pictures of a source get captions by one model, and another one says which of them fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from terrace.recipe.schema_inputs import Name, Strict

Text = Literal["own", "written"]


class Recaption(Strict):
    """What `terrace recaption` makes of a source: shards of captions that fit. A run itself does not read this section."""

    source: Name = Field(description="Source of kind caption or picture whose pictures are captioned; each sample has one.")
    out: str = Field(description="Folder or s3:// URI of the result; a source of captions reads `<out>/shards/`.")
    texts: list[Text] = Field(
        ["own", "written"], min_length=1, description="Which captions may be kept: the sample's own, one that `captioner` writes, or both."
    )
    captioner: str | None = Field(None, description="Model directory that writes captions.")
    prompt: str = Field("Describe the image in one sentence.", description="What it is asked beside the picture; empty: the picture alone.")
    max_new_tokens: int = Field(64, ge=1, le=4096, description="Tokens of a caption; a longer one has no end and is refused.")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(0.0, description="Of sampling; 0: the likeliest token. BLIP samples, at 1.0.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus of sampling. BLIP: 0.9.")
    seed: int = Field(0, ge=0, description="Seed of sampling.")
    filter: str | None = Field(
        None, description="Model directory that says how well picture and text fit: two towers (cosine) or blip_2_matching (probability)."
    )
    threshold: float | None = Field(None, description="A caption is kept where the filter says this or more.")
    samples_per_shard: int = Field(1000, ge=1, description="Samples that are captioned, judged and written together: what a kill can cost.")
