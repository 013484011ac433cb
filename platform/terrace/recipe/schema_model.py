"""The model of a recipe: its family, its configuration and where its weights come from. Part of the schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from terrace.families.connector import Connector, folded
from terrace.recipe.schema_inputs import Strict

FROM_STAGE = "stage:"  # in front of the name of an earlier stage, where a place of weights may stand


class Initialisation(Strict):
    """Where each part's weights come from: a Hugging Face directory or s3:// URI, `random`, or in the model of a stage `stage:NAME`."""

    vision: str = Field("random", description="Source of the vision tower's weights: a directory, s3:// URI, `random` or `stage:NAME`.")
    projector: str = Field("random", description="Source of the projector's weights: a directory, s3:// URI, `random` or `stage:NAME`.")
    language: str = Field("random", description="Source of the language model's weights: a directory, s3:// URI, `random` or `stage:NAME`.")

    def stages(self) -> dict[str, str]:
        """Part -> the earlier stage whose final weights it takes."""
        return {part: place.removeprefix(FROM_STAGE) for part, place in self if place.startswith(FROM_STAGE)}


class Model(Strict):
    architecture: str = Field(
        "qwen2_5_vl",
        description="The model family: a transformers model type that Terrace knows, or `package.module` that holds one of your own.",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="The transformers configuration, every shape field set: `text_config`, `vision_config`, token ids.",
    )
    pretrained: str | None = Field(None, description="Hugging Face directory or s3:// URI holding config.json and safetensors.")
    connector: Connector | None = Field(
        None, description="Between a tower and a language model of different origin (architecture terrace_vlm)."
    )
    init: Initialisation | None = Field(None, description="Per-part weights on top of `config`; parts not named start random.")
    seed: int = Field(0, ge=0, description="Seed of the random initialisation.")
    attention: Literal["auto", "varlen", "flash_attn", "sdpa_segments", "flex"] = Field(
        "auto",
        description="Attention kernels over the segments of a pack; `auto` picks by capability and logs the reason.",
    )
    kernels: Literal["auto", "liger", "torch"] = Field(
        "auto", description="Norms and gates: Liger's fused kernels on CUDA where installed, or PyTorch's own operations."
    )
    stands_in_for: str | None = Field(
        None, description="Says what the published model has instead, where this model only stands in for a part of it."
    )

    _coming: int = PrivateAttr(0)  # tokens that other stages of the recipe add, which this model's vocabulary lacks
    _written: Any = PrivateAttr(None)  # the recipe's own model, where this is that of a stage which changes it

    @property
    def written(self) -> Model:
        return self if self._written is None else self._written

    @property
    def coming_tokens(self) -> int:
        return self._coming

    def before_tokens(self, count: int) -> Model:
        """The model of a stage without `count` tokens that others have."""
        copied = self.model_copy()._as_written(self.written)
        copied._coming = count
        return copied

    def with_config(self, config: dict[str, Any]) -> Model:
        """The model with another configuration, as a stage's changes make it."""
        return self.model_copy(update={"config": config})._as_written(self.written)

    def with_places(self, places: dict[str, str]) -> Model:
        """The model whose parts take their weights from these places (part -> directory), the other parts as before."""
        init = (self.init or Initialisation()).model_copy(update=places)
        return self.model_copy(update={"init": init})._as_written(self.written)

    def of_stage(self, written: Model) -> Model:
        """This model as that of a stage, in a recipe whose own is `written`."""
        return self.model_copy()._as_written(written)

    def _as_written(self, written: Model) -> Model:
        self._written = written
        return self

    @model_validator(mode="before")
    @classmethod
    def _connector_in_the_configuration(cls, value: Any) -> Any:
        return folded(value)
