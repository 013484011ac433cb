"""How a part trains: its learning rate, which of its tensors, or low-rank adapters beside its linear layers in their place."""

from __future__ import annotations

from typing import Annotated, Literal

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


class PartTraining(Strict):
    lr: Positive = Field(description="Peak learning rate of the part.")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Learning rate of layer l is lr * layer_decay^(layers - l) (BEiT, Qwen-VL: 0.95 for the ViT)."
    )
    optimizer_state: Literal["reset", "keep"] = Field("reset", description="At the stage's start, if the part trained before.")
    activation_checkpointing: bool = Field(False, description="Recompute the part's activations in the backward pass to save memory.")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="Overrides the optimizer's for this part.")
    drop_path: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Stochastic depth of vision: chance that a picture goes past a branch of the last block; rises in a line from 0 in the"
        " first (mae, objectives over views).",
    )
    only: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="Only tensors with one of these words in their names train (`mlp`, `self_attn.q_proj`); none given: all."
    )
    lora: Lora | None = Field(None, description="Low-rank adapters train in place of the part's own weights.")
