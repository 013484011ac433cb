"""A stage that changes on its way: from which step on which resolution and mixture hold. Pure functions of the recipe.

A stage without `changes` is one stretch, itself. Whatever describes a stage as a whole (held-out losses, the files of its
export, the largest image that must fit) looks at the last stretch or at all of them; the order of the data walks through them.
"""

from __future__ import annotations

from terrace.recipe.schema import Stage


def stretches(stage: Stage) -> list[tuple[int, Stage]]:
    """(first step, the stage as it is from there on), without changes and without sources of weight 0."""
    if not stage.changes:
        return [(0, stage)]
    pixels, weights = stage.pixels, dict(stage.mixture.weights)
    found = [(0, _as(stage, pixels, weights))]
    for change in stage.changes:
        pixels, weights = change.pixels or pixels, weights | change.weights
        found.append((change.step, _as(stage, pixels, weights)))
    return found


def last_stretch(stage: Stage) -> Stage:
    """The stage as it is at its end."""
    return stretches(stage)[-1][1]


def _as(stage: Stage, pixels: object, weights: dict[str, float]) -> Stage:
    mixture = stage.mixture.model_copy(update={"weights": {name: weight for name, weight in weights.items() if weight}})
    return stage.model_copy(update={"pixels": pixels, "mixture": mixture, "changes": []})
