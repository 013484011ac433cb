"""Rules of `changes` inside a stage, and of sources that wait for one with a weight of 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from terrace.errors import nearest
from terrace.recipe.errors import Path, Problem
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Recipe, Stage
from terrace.recipe.stretches import stretches

Rule = Callable[[Recipe, Stage, Path], Iterator[Problem]]


def check(recipe: Recipe, stage: Stage, at: Path, resolution: Rule) -> Iterator[Problem]:
    """`resolution` is the rule of a stage's image sizes, which every stretch must keep."""
    raised = {name for change in stage.changes for name, weight in change.weights.items() if weight}
    for name, weight in stage.mixture.weights.items():
        if not weight and name not in raised:
            yield Problem((*at, "mixture", "weights", name), "has weight 0 and no change of the stage raises it; leave the source out")
    if not any(stage.mixture.weights.values()):
        yield Problem((*at, "mixture"), "has no source with a weight above 0 at the stage's beginning")
    if not stage.changes:
        return
    yield from _fits(stage, at)
    before = 0
    for number, change in enumerate(stage.changes):
        here: Path = (*at, "changes", number)
        if change.step <= before:
            yield Problem((*here, "step"), f"{change.step} does not come after the change before it, at {before}")
        before = change.step
        if change.pixels is None and not change.weights:
            yield Problem(here, "changes nothing; give pixels, weights or both")
        for name in change.weights:
            if name not in stage.mixture.weights:
                told = f"`{name}` is not in the stage's mixture{nearest(name, stage.mixture.weights)}; name it there, with weight 0"
                yield Problem((*here, "weights", name), told)
    for number, (_, part) in enumerate(stretches(stage)[1:]):
        if not part.mixture.weights:
            yield Problem((*at, "changes", number, "weights"), "leaves no source with a weight above 0")
        elif stage.changes[number].pixels is not None:
            yield from resolution(recipe, part, (*at, "changes", number))


def _fits(stage: Stage, at: Path) -> Iterator[Problem]:
    """What a stage with changes may not be."""
    here: Path = (*at, "changes")
    if not OBJECTIVES[stage.objective].reads_packs:
        yield Problem(here, f"the objective {stage.objective} draws its own batches: only stages that train on packs may change inside")
    if stage.mixture.epoch_caps:
        yield Problem((*at, "mixture", "epoch_caps"), "cannot stand beside changes, which count steps; use two stages")
    budget = stage.budget
    steps = budget.steps
    if budget.tokens is not None:
        steps = -int(-budget.tokens // (stage.batch.packs * stage.sequence_length))
    if steps is None:
        yield Problem((*at, "budget"), "a stage with changes has a budget in steps or tokens: changes count steps")
    elif stage.changes[-1].step >= steps:
        last = len(stage.changes) - 1
        yield Problem((*here, last, "step"), f"{stage.changes[last].step} is not before the end of the stage's {steps} steps")
