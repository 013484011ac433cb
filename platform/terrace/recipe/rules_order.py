"""Rules on the order of stages: their names, what they start from and what they wait for."""

from __future__ import annotations

from collections.abc import Iterator

from terrace.errors import nearest
from terrace.recipe.errors import Path, Problem
from terrace.recipe.schema import Recipe


def check(recipe: Recipe) -> Iterator[Problem]:
    names = [stage.name for stage in recipe.stages]
    for index, stage in enumerate(recipe.stages):
        if stage.name in names[:index]:
            yield Problem(
                ("stages", index, "name"),
                f"`{stage.name}` is also the name of stage {names.index(stage.name)} (counted from 0)",
            )
        yield from _after(recipe, index, names)
        start = stage.start_from
        if start is None:
            continue
        key: Path = ("stages", index, "start_from")
        if start not in names:
            yield Problem(key, f"there is no stage `{start}`{nearest(start, names[:index])}")
        elif start not in names[:index]:
            yield Problem(key, f"stage `{start}` does not run before `{stage.name}`; a stage starts from an earlier one")


def _after(recipe: Recipe, index: int, names: list[str]) -> Iterator[Problem]:
    stage, key = recipe.stages[index], ("stages", index, "after")
    if stage.after and recipe.stage_order == "sequence":
        yield Problem(key, "only has a meaning with `stage_order: graph`; in a sequence each stage waits for all before it")
    for place, other in enumerate(stage.after):
        if other not in names:
            yield Problem((*key, place), f"there is no stage `{other}`{nearest(other, names[:index])}")
        elif other not in names[:index]:
            yield Problem((*key, place), f"stage `{other}` does not stand before `{stage.name}`; a stage waits for earlier ones")
