"""How a stage steps: the optimizer, the learning rate over the steps, the running average of weights. Part of the schema."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from terrace.recipe.schema_inputs import Positive, Share, Strict


class Optimizer(Strict):
    kind: Literal["adamw", "sgd", "lars", "adafactor", "muon"] = Field(
        "adamw", description="Optimizer. muon is for the matrices of blocks and projector, with adamw for all other tensors."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Of sgd and lars (0: none) and muon (0: its usual 0.95).")
    trust: Positive = Field(0.001, description="lars: the step in a matrix, as a share of its norm, at learning rate 1.")
    nesterov: bool = Field(False, description="sgd looks ahead by its momentum.")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW's two decay rates.")
    eps: Positive = Field(1e-8, description="AdamW's epsilon.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="Decoupled weight decay; a part may override it.")
    final_weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="The decay at the stage's end, to which it goes by a cosine (DINO: from 0.04 to 0.4); none: it stays."
    )
    clip: Positive | None = Field(1.0, description="Global gradient norm limit; null: none.")


class Schedule(Strict):
    kind: Literal["cosine", "linear", "constant", "wsd", "step"] = Field(
        "cosine", description="Learning rate after the warm-up. wsd: stable at the peak, then a decay; step: falls at milestones."
    )
    warmup: Annotated[float, Field(ge=0)] = Field(0.03, description="Share of the steps below 1, steps from 1 on.")
    min_ratio: Share = Field(0.1, description="Final learning rate as a share of the peak.")
    decay: Annotated[float, Field(gt=0)] = Field(0.1, description="wsd: length of the decay; share of the steps below 1, steps from 1 on.")
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field("linear", description="wsd: how it falls; sqrt: by 1 - sqrt of the way.")
    milestones: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="step: where the rate is multiplied by `factor`; shares of the steps below 1, steps from 1 on."
    )
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="step: what the rate is multiplied by at each milestone.")


class WeightAverage(Strict):
    """A running average of the trained weights: average = decay * average + (1 - decay) * weights after every step."""

    decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, description="Share of the average that stays in a step.")
    export: bool = Field(False, description="Also write the averaged weights, to `final-ema/` beside `final/`.")
