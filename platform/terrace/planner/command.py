"""`terrace plan RECIPE`: memory, FLOPs, time and cost of every stage, before anything runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from terrace.errors import InputError
from terrace.recipe.schema import Recipe

if TYPE_CHECKING:
    from terrace.planner.data_facts import SourceFacts


def register(subparsers: argparse._SubParsersAction) -> None:
    plan = subparsers.add_parser(
        "plan",
        help="memory, FLOPs, hours and cost per stage, before anything runs",
        description="Plan a recipe from its text alone: whether each stage fits on the GPUs, how long it takes, what it costs.",
    )
    plan.add_argument("recipe", type=Path, help="recipe file (YAML)")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="changes to the recipe")
    plan.add_argument("--gpu", help="GPU by name, for example h100-80gb (default: the recipe's planning.gpu)")
    plan.add_argument("--gpus", type=_positive_int, help="how many (default: each stage's resources.workers)")
    plan.add_argument("--mfu", type=_share, help="share of the GPU's peak that training reaches (default: planning.mfu)")
    plan.add_argument("--price", type=_positive, help="price of one GPU hour (default: planning.price_per_gpu_hour)")
    plan.add_argument("--data", type=Path, metavar="DIR", help="prepared data (RUN_DIR/data): exact samples and epochs")
    plan.add_argument("--index", action="store_true", help="the same from data that is prepared now, in the user's cache folder")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.set_defaults(main=plan_command)


def plan_command(arguments: argparse.Namespace) -> int:
    from terrace.planner.plan import make_plan
    from terrace.planner.render import plan_values, print_plan
    from terrace.recipe.loading import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    plan = make_plan(
        recipe,
        gpu=arguments.gpu,
        gpus=arguments.gpus,
        mfu=arguments.mfu,
        price_per_gpu_hour=arguments.price,
        facts=_facts(recipe, arguments),
    )
    if arguments.json:
        print(json.dumps(plan_values(plan), indent=2))
    else:
        print_plan(plan)
    return 0


def _facts(recipe: Recipe, arguments: argparse.Namespace) -> list[dict[str, SourceFacts]] | None:
    """What prepared data says: that which is named, or is made now."""
    from terrace.data.lines import Lines
    from terrace.data.prepare import prepare_data
    from terrace.planner.data_facts import load_facts

    if arguments.data is not None and arguments.index:
        raise InputError("--data names data that is prepared, --index prepares it: give one of them")
    if arguments.data is not None:
        return load_facts(recipe, arguments.data)
    return load_facts(recipe, prepare_data(recipe, progress=Lines()).root) if arguments.index else None


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _positive_int(text: str) -> int:
    return int(_positive(str(int(text))))


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value
