"""Options of heads that predict further tokens: `train.heads`, and the objectives mtp and medusa. Part of the schema."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from terrace.recipe.schema_inputs import Positive, Share, Strict


class HeadsTraining(Strict):
    """Heads are a part of their own beside the model; they always train where they are named."""

    lr: Positive = Field(description="Peak learning rate of the heads.")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="Overrides the optimizer's for the heads.")


class MtpOptions(Strict):
    """Multi-token prediction as in DeepSeek-V3 and MiMo: a further block per depth that sees hidden state and next embedding."""

    depth: int = Field(1, ge=1, le=8, description="Further tokens that are predicted, each by a block of its own.")
    weight: Positive = Field(0.3, description="Weight of the mean loss of the depths beside the model's own.")
    later_weight: Positive = Field(0.1, description="The weight from `switch` on.")
    switch: Share = Field(0.7, description="Share of the steps after which the weight is `later_weight`; 1: never.")


class MedusaOptions(Strict):
    """Medusa: heads that read the same hidden state, each for a token further ahead."""

    heads: int = Field(3, ge=1, le=8, description="Further tokens that are predicted, each by a head of its own.")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(0.8, description="The loss of head k (from 1) weighs decay^k.")
