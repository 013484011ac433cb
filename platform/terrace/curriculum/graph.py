"""Which stage waits for which. Pure.

By default stages run one after the other, in the order they are written. With `stage_order: graph` a stage waits only for the one whose
weights it starts from (or those that it takes parts of), those that judge its answers and those named in `after`; all stand before it
in the recipe, so there is no circle. The first stage is the only one that waits for none: by the time that two stages run side by
side, the data is prepared.
"""

from __future__ import annotations

from terrace.curriculum.state import RunState, StageState
from terrace.recipe.identity import judges_of, start_index, taken_from
from terrace.recipe.schema import Recipe


def source_stages(recipe: Recipe, index: int) -> list[str]:
    """The stages whose final weights stage `index` starts from: one as a whole, or of several their parts; none for the first."""
    whole = start_index(recipe, index)
    found = taken_from(recipe, index).values() if whole is None else [whole]
    return [recipe.stages[place].name for place in sorted(set(found))]


def source_stage(recipe: Recipe, index: int) -> str | None:
    """`source_stages` in words; None where there is none."""
    return ", ".join(source_stages(recipe, index)) or None


def waits_for(recipe: Recipe, index: int) -> set[str]:
    """Stages that must be complete before stage `index` begins."""
    if recipe.stage_order == "sequence":
        return {stage.name for stage in recipe.stages[:index]}
    judges = [recipe.stages[place].name for place in judges_of(recipe, index).values()]
    named = {*recipe.stages[index].after, *source_stages(recipe, index), *judges}
    if source_stages(recipe, index) or recipe.stages[index].after:
        return named
    return named | {stage.name for stage in recipe.stages[: min(index, 1)]}  # a model of its own that takes nothing: after the first


def with_dependents(recipe: Recipe, name: str) -> list[str]:
    """The stage and every one that waits for it, directly or not, in the recipe's order."""
    found = {name}
    for index, stage in enumerate(recipe.stages):
        if waits_for(recipe, index) & found:
            found.add(stage.name)
    return [stage.name for stage in recipe.stages if stage.name in found]


def ready_stages(recipe: Recipe, state: RunState) -> list[StageState]:
    """Stages that are not complete, have no attempt in flight and wait for no other stage."""
    done = {stage.name for stage in state.stages if stage.phase == "completed"}
    return [stage for stage in state.stages if stage.phase != "completed" and stage.ended and waits_for(recipe, stage.index) <= done]
