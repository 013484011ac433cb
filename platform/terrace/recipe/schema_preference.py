"""Options of the objectives that compare answers: dpo, mpo, kto, orpo, simpo. Part of the schema."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from terrace.recipe.schema_inputs import Positive, Strict

NotNegative = Annotated[float, Field(ge=0)]


class DpoOptions(Strict):
    """Direct preference optimisation: two answers to one prompt, against the stage's first weights."""

    beta: Positive = Field(0.1, description="Strength of the pull towards the reference; IPO's tau.")
    loss: Literal["sigmoid", "ipo", "robust"] = Field(
        "sigmoid", description="Of the margin: -log sigmoid; the squared distance to 1 / (2 beta) per token; or unbiased by flipped labels."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Share of pairs that are believed to be the wrong way round (sigmoid and robust)."
    )
    reference_free: bool = Field(False, description="No reference: as if it found every answer equally likely.")
    sft_weight: NotNegative = Field(0.0, description="Weight of the mean negative log-likelihood of the chosen answers' tokens.")


class MpoOptions(Strict):
    """Mixed preference optimisation (InternVL): which is better, how good each is, and how to write the better one."""

    beta: Positive = Field(0.1, description="Strength of the pull towards the reference.")
    preference_weight: NotNegative = Field(0.8, description="Weight of dpo's sigmoid loss.")
    quality_weight: NotNegative = Field(0.2, description="Weight of the binary classifier's loss of each answer (BCO, without a shift).")
    generation_weight: NotNegative = Field(1.0, description="Weight of the mean negative log-likelihood of the chosen answers' tokens.")


class KtoOptions(Strict):
    """Kahneman-Tversky optimisation: single answers, each wanted or not. A pair counts as one of each."""

    beta: Positive = Field(0.1, description="Strength of the pull towards the reference.")
    desirable_weight: NotNegative = Field(1.0, description="Weight of the wanted answers.")
    undesirable_weight: NotNegative = Field(1.0, description="Weight of the unwanted answers.")


class OrpoOptions(Strict):
    """Odds-ratio preference optimisation: likelihood of the chosen answer and the ratio of odds, without a reference."""

    beta: Positive = Field(0.1, description="Weight of the odds ratio beside the likelihood (lambda in the paper).")


class SimpoOptions(Strict):
    """Simple preference optimisation: mean log-probabilities per token and a target margin, without a reference."""

    beta: Positive = Field(2.0, description="Scale of the mean log-probabilities.")
    gamma: NotNegative = Field(1.0, description="Margin that the chosen answer is to win by.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Share of pairs that are believed to be the wrong way round."
    )
    sft_weight: NotNegative = Field(0.0, description="Weight of the mean negative log-likelihood of the chosen answers' tokens.")
