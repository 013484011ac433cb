"""What chance decides of the views of a picture: pure functions of (stage seed, source, sample, epoch, view).

A plan is a small value that can be printed; data.views.augment carries it out. Nothing here depends on rank, pack or step, so a resumed
stage and one on other workers see the same views.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from terrace.data.order.permutation import generator_of
from terrace.recipe.schema_views import View

ATTEMPTS = 10  # at a cut that lies in the picture, before the middle is taken


@dataclass(frozen=True)
class ViewPlan:
    """One view of one picture. `box` is (left, top, width, height) in pixels of the picture that the tower is given."""

    side: int
    box: tuple[int, int, int, int]
    flipped: bool
    jitter: tuple[tuple[str, float], ...] = ()  # in this order: brightness, contrast, saturation (factors), hue (turn)
    grey: bool = False
    blur_sigma: float = 0.0  # pixels of the view; 0: none
    solarised: bool = False

    def __str__(self) -> str:
        left, top, width, height = self.box
        words = [f"{width}x{height} at ({left}, {top}) to {self.side}x{self.side}"]
        words += ["mirrored"] * self.flipped + [f"{name} {value:.3g}" for name, value in self.jitter] + ["grey"] * self.grey
        words += [f"blur {self.blur_sigma:.3g}"] * bool(self.blur_sigma) + ["solarised"] * self.solarised
        return ", ".join(words)


def single_views(views: Sequence[View]) -> list[View]:
    """One entry for each view of a picture."""
    return [view for view in views for _ in range(view.count)]


def plan_views(
    views: Sequence[View], picture_side: int, seed: int, source: str, sample: str, epoch: int
) -> list[ViewPlan]:
    """All views of one picture, which is a square of `picture_side` pixels."""
    return list(_plans(single_views(views), picture_side, seed, source, sample, epoch))


def _plans(views: Sequence[View], picture_side: int, seed: int, source: str, sample: str, epoch: int) -> Iterator[ViewPlan]:
    for number, view in enumerate(views):
        yield _plan(view, picture_side, generator_of(seed, source, sample, epoch, f"view {number}"))


def _plan(view: View, picture_side: int, rng: np.random.Generator) -> ViewPlan:
    """Every number is drawn whether it is needed or not, so that a changed chance moves nothing else."""
    box = _box(view, picture_side, rng)
    flip, jitter, grey, blur, solarise = rng.random(5)
    names = [("brightness", view.brightness), ("contrast", view.contrast), ("saturation", view.saturation), ("hue", view.hue)]
    order, around = rng.permutation(4), rng.uniform(-1, 1, 4)
    changes = [(name, strength * move if name == "hue" else _factor(strength, move)) for (name, strength), move in zip(names, around)]
    sigma = float(rng.uniform(*view.blur_sigma))
    return ViewPlan(
        side=view.side or picture_side,
        box=box,
        flipped=bool(flip < view.flip),
        jitter=tuple((changes[place][0], float(changes[place][1])) for place in order if names[place][1]) if jitter < view.jitter else (),
        grey=bool(grey < view.grey),
        blur_sigma=sigma if blur < view.blur else 0.0,
        solarised=bool(solarise < view.solarise),
    )


def _factor(strength: float, move: float) -> float:
    """Uniform between max(0, 1 - strength) and 1 + strength."""
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * (move + 1) / 2


def _box(view: View, side: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """As published implementations cut: area and logarithm of the aspect uniform, the place uniform; the whole picture if none fits."""
    areas = rng.uniform(*view.area, ATTEMPTS) * side * side
    aspects = np.exp(rng.uniform(math.log(view.aspect[0]), math.log(view.aspect[1]), ATTEMPTS))
    across, down = rng.random(2)
    for area, aspect in zip(areas, aspects):
        width, height = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if width <= side and height <= side:
            return int(across * (side - width + 1)), int(down * (side - height + 1)), width, height
    return 0, 0, side, side
