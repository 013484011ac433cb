"""Views of a picture, and the options of the objectives that compare them. Part of the schema.

A section of `views` says how one view comes about, or several of the same kind. Where a stage gives none, the views are those that
the objective was published with (`PUBLISHED_VIEWS`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from terrace.recipe.schema_inputs import Positive, Share, Strict

Width = Annotated[int, Field(ge=1)]
Strength = Annotated[float, Field(ge=0)]


class View(Strict):
    """One view: a random part of the picture, resized; perhaps mirrored, of other colours, grey, blurred, solarised, in this order."""

    count: int = Field(1, ge=1, le=64, description="Views of this kind, each with chance of its own.")
    side: int | None = Field(None, ge=8, description="Pixels of its side; default: the tower's `image_size`.")
    area: tuple[Share, Share] = Field((0.2, 1.0), description="Share of the picture's area that is cut out, from and to.")
    aspect: tuple[Positive, Positive] = Field((0.75, 1.3333), description="Width over height of the cut, from and to.")
    flip: Share = Field(0.5, description="Chance that it is mirrored, left to right.")
    jitter: Share = Field(0.8, description="Chance that its colours change by the next four, in random order.")
    brightness: Strength = Field(0.4, description="Brightness times 1 - this to 1 + this.")
    contrast: Strength = Field(0.4, description="Contrast times 1 - this to 1 + this.")
    saturation: Strength = Field(0.4, description="Saturation times 1 - this to 1 + this.")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.1, description="Turn of the colour circle, from minus to plus this share of it.")
    grey: Share = Field(0.2, description="Chance that it loses its colours.")
    blur: Share = Field(0.5, description="Chance that it is blurred by a Gaussian.")
    blur_sigma: tuple[Positive, Positive] = Field((0.1, 2.0), description="Deviation of the Gaussian in pixels of the view, from and to.")
    solarise: Share = Field(0.0, description="Chance that values of 128 and above are turned into their opposites.")


_SOFT = {"saturation": 0.2}
_FIRST, _SECOND = {"blur": 1.0, **_SOFT}, {"blur": 0.1, "solarise": 0.2, **_SOFT}
_PAIR = [View(), View()]
_BYOL = [View(area=(0.08, 1.0), **_FIRST), View(area=(0.08, 1.0), **_SECOND)]
PUBLISHED_VIEWS: dict[str, list[View]] = {
    "simclr": [View(area=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, count=2)],
    "moco": _BYOL,
    "byol": _BYOL,
    "simsiam": _PAIR,
    "dino": [
        View(area=(0.4, 1.0), **_FIRST), View(area=(0.4, 1.0), **_SECOND), View(count=8, side=96, area=(0.05, 0.4), **_SOFT),
    ],
    "swav": [
        View(count=2, area=(0.14, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
        View(count=6, side=96, area=(0.05, 0.14), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
    ],
    "instance_discrimination": [View(jitter=1.0, blur=0.0)],
    "cpc": [View(area=(0.3, 1.0), blur=0.0)],
}  # fmt: skip


class Projector(Strict):
    """The head behind the tower: linear layers with a norm and a rectifier between them."""

    layers: int = Field(2, ge=1, le=8, description="Linear layers of the projector.")
    hidden_width: Width = Field(2048, description="Width between the projector's layers.")
    output_width: Width = Field(128, description="Width of what it gives.")
    norm: Literal["batch", "layer", "none"] = Field(
        "batch", description="Norm behind the heads' layers. batch: over one view of the whole global batch, whatever the workers."
    )


class Momentum(Strict):
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.996, description="Share of the teacher that stays in a step; rises by a cosine over the stage."
    )
    final_momentum: Share = Field(1.0, description="That share at the stage's end.")


class SimclrOptions(Projector):
    layers: int = Field(3, ge=1, le=8, description="Linear layers of the projector.")
    temperature: Positive = Field(0.1, description="Similarities are divided by this.")


class MocoOptions(Projector, Momentum):
    """With a `queue` MoCo v2: keys of earlier batches are the other answers. Without one MoCo v3: those of the batch are."""

    queue: int = Field(0, ge=0, description="Keys of earlier batches (v2: 65,536); 0: those of the batch, a predictor, both ways (v3).")
    layers: int = Field(3, ge=1, le=8, description="Linear layers of the projector (v2: 2).")
    hidden_width: Width = Field(4096, description="Width between the heads' layers (v2: 2,048).")
    output_width: Width = Field(256, description="Width of what they give (v2: 128).")
    temperature: Positive = Field(0.2, description="Similarities are divided by this.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="Share of the teacher that stays in a step; rises by a cosine over the stage (v2: 0.999, and stays)."
    )


class ByolOptions(Projector, Momentum):
    hidden_width: Width = Field(4096, description="Width between the heads' layers.")
    output_width: Width = Field(256, description="Width of what they give.")


class SimsiamOptions(Projector):
    layers: int = Field(3, ge=1, le=8, description="Linear layers of the projector.")
    output_width: Width = Field(2048, description="Width of what it gives.")
    predictor_width: Width = Field(512, description="Width between the predictor's two layers.")


class DinoOptions(Projector, Momentum):
    layers: int = Field(3, ge=1, le=8, description="Linear layers of the projector.")
    output_width: Width = Field(256, description="Width of what the prototypes are compared with.")
    norm: Literal["batch", "layer", "none"] = Field("none", description="Norm behind the projector's layers.")
    prototypes: int = Field(65536, ge=2, description="Classes that the head tells apart.")
    student_temperature: Positive = Field(0.1, description="Of the student's distribution.")
    teacher_temperature: Positive = Field(0.07, description="Of the teacher's distribution, once it is warm.")
    first_teacher_temperature: Positive = Field(0.04, description="The same at the stage's begin; rises in a line.")
    temperature_warmup: Share = Field(0.3, description="Share of the steps in which it rises.")
    centre_momentum: Share = Field(0.9, description="Share of the centre that stays in a step.")
    frozen_prototypes: Share = Field(0.01, description="Share of the steps at the begin in which the prototypes stay as they are.")


class SwavOptions(Projector):
    prototypes: int = Field(3000, ge=2, description="Prototypes that every view is assigned to.")
    temperature: Positive = Field(0.1, description="Of the distribution that a view gives itself.")
    sharpness: Positive = Field(0.05, description="Of the assignment (epsilon).")
    iterations: int = Field(3, ge=1, description="Of Sinkhorn and Knopp's algorithm.")
    queue: int = Field(0, ge=0, description="Vectors of earlier batches that the assignment counts too (small batches: 3,840).")
    queue_from: Share = Field(0.1, description="Share of the steps before they count.")
    frozen_prototypes: Share = Field(0.01, description="Share of the steps at the begin in which the prototypes stay as they are.")


class InstanceOptions(Projector):
    """Every picture is a class of its own; a bank keeps a vector of each."""

    layers: int = Field(1, ge=1, le=8, description="Linear layers of the projector.")
    norm: Literal["batch", "layer", "none"] = Field("none", description="Norm behind the projector's layers.")
    temperature: Positive = Field(0.07, description="Similarities are divided by this.")
    bank_momentum: Share = Field(0.5, description="Share of a picture's vector in the bank that stays when it is seen again.")


class CpcOptions(Projector):
    """Rows of cuts are read from above; what follows below is to be told from all other cuts of the batch."""

    layers: int = Field(1, ge=1, le=8, description="Linear layers of the projector.")
    norm: Literal["batch", "layer", "none"] = Field("none", description="Norm behind the projector's layers.")
    grid: int = Field(7, ge=2, le=16, description="Cuts of a view in each direction, each overlapped by half by the next.")
    ahead: int = Field(5, ge=1, le=15, description="Rows that are predicted; fewer than `grid`.")
    context_width: Width = Field(256, description="Width of what is known of the rows above.")
    temperature: Positive = Field(1.0, description="Similarities are divided by this.")


VIEW_OPTIONS: dict[str, type[Projector]] = {
    "simclr": SimclrOptions, "moco": MocoOptions, "byol": ByolOptions, "simsiam": SimsiamOptions, "dino": DinoOptions, "swav": SwavOptions,
    "instance_discrimination": InstanceOptions, "cpc": CpcOptions,
}  # fmt: skip
