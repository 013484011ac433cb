"""`terrace render`: print the Kubernetes resource of a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "render",
        help="print the Kubernetes resource of a recipe",
        description="Print the Curriculum of a recipe for a cluster: `terrace render R --cluster C | kubectl apply -f -`.",
    )
    parser.add_argument("recipe", type=Path, help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--cluster", type=Path, required=True, help="cluster file (YAML): runtime, storage, queue, tracking")
    parser.add_argument("--name", help="name of the resource; default: the recipe's")
    parser.add_argument("--namespace", "-n", help="namespace written into the resource")
    parser.set_defaults(main=render_command)


def render_command(arguments: argparse.Namespace) -> int:
    from terrace.cluster.render import load_cluster, render_curriculum, to_yaml
    from terrace.recipe.loading import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(to_yaml(render_curriculum(recipe, load_cluster(arguments.cluster), arguments.name, arguments.namespace)), end="")
    return 0
