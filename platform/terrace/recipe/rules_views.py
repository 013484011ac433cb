"""Rules about the objectives over views: their views, what trains, how their tower is spread."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from terrace.families.interface import Family
from terrace.families.one_square import Squares
from terrace.recipe.errors import Path, Problem
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import PARTS, Stage
from terrace.recipe.schema_views import CpcOptions

VIEWS_OF = {"mae": 1, "simclr": 2, "moco": 2, "byol": 2, "simsiam": 2, "instance_discrimination": 1, "cpc": 1}  # dino and swav: two or more


def check(family: Family, stage: Stage, at: Path) -> Iterator[Problem]:
    yield from _drop_path(stage, at)
    options = stage.view_options
    if options is None:
        if stage.views and OBJECTIVES[stage.objective].views:
            yield from _views(family, stage, at)
        elif stage.views:
            names = [name for name, entry in OBJECTIVES.items() if entry.views]
            yield Problem((*at, "views"), f"are compared by objectives {', '.join(names)}; this stage's objective is {stage.objective}")
        return
    if not isinstance(family, Squares):
        told = f"{stage.objective} compares squares of one size; {family.name} shows pictures of their own sizes"
        yield Problem((*at, "objective"), told)
        return
    for part in ("projector", "language"):
        if getattr(stage.train, part) is not None:
            yield Problem((*at, "train", part), f"{stage.objective} trains `vision` and `heads`; nothing tells {part} anything")
    if stage.train.vision is not None and stage.train.vision.lora is not None:
        told = f"adapters are not offered under {stage.objective}: its teacher follows whole weights"
        yield Problem((*at, "train", "vision", "lora"), told)
    if stage.parallel.strategy == "zero3":
        yield Problem((*at, "parallel", "strategy"), f"zero3 is not offered under {stage.objective}; use fsdp, which splits as much")
    if options.norm == "batch" and stage.batch.packs * stage.batch.samples_per_pack < 2:
        yield Problem((*at, "batch"), f"a norm over the batch needs two pictures or more; or give {stage.objective}: {{norm: layer}}")
    yield from _views(family, stage, at)


def _drop_path(stage: Stage, at: Path) -> Iterator[Problem]:
    """Which part a picture may go past, and that blocks which run twice find its factors again."""
    for part in PARTS:
        training = getattr(stage.train, part)
        if training is None or not training.drop_path:
            continue
        key: Path = (*at, "train", part, "drop_path")
        if part != "vision" or not OBJECTIVES[stage.objective].views:
            names = ", ".join(name for name, entry in OBJECTIVES.items() if entry.views)
            yield Problem(key, f"is offered for vision under the objectives {names}; leave it out")
            continue
        if stage.parallel.compile:
            yield Problem(key, "is not offered with parallel.compile, whose blocks would not see what is left out; use one of both")
        sizes = [size for size, _ in groupby(view.side for view in stage.planned_views)]
        if training.activation_checkpointing and len(set(sizes)) < len(sizes):
            yield Problem(key, "with activation_checkpointing wants views of one size beside one another: sort them by `side`")


def _views(family: Squares, stage: Stage, at: Path) -> Iterator[Problem]:
    count, wanted = sum(view.count for view in stage.planned_views), VIEWS_OF.get(stage.objective)
    if wanted is not None and count != wanted:
        yield Problem((*at, "views"), f"are {count}; {stage.objective} sees {wanted} of each picture")
    elif wanted is None and count < 2:
        yield Problem((*at, "views"), f"are {count}; {stage.objective} needs two whole ones, and as many parts as you like behind them")
    published = "" if stage.views else f" (of the published views of {stage.objective}: give `views` of your own)"
    for number, view in enumerate(stage.planned_views):
        key: Path = (*at, "views", number) if stage.views else (*at, "views")
        if stage.objective == "mae" and view.side is not None:
            yield Problem(key, "side is the tower's own under objective mae; leave it out")
        elif view.side is not None and (told := family.unfit(view.side)):
            yield Problem(key, told + published)
        for name in ("area", "aspect", "blur_sigma"):
            low, high = getattr(view, name)
            if low > high or not high:
                yield Problem(key, f"{name} goes from {low:g} to {high:g}: give the lower one first, and an upper one above 0")
    options = stage.view_options
    if isinstance(options, CpcOptions) and stage.planned_views:
        whole = stage.planned_views[0].side or family.side
        side, left = divmod(2 * whole, options.grid + 1)
        told = "they must be an even number of whole pixels" if left or side % 2 else family.unfit(side)
        if told:
            size = 2 * whole / (options.grid + 1)
            yield Problem((*at, "cpc", "grid"), f"{options.grid} squares of {size:g} pixels overlap by half in a view of {whole}: {told}")
        if options.ahead >= options.grid:
            yield Problem((*at, "cpc", "ahead"), f"{options.ahead} rows below a row are not there in a grid of {options.grid}")
