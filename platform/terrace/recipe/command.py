"""`terrace schema`: the JSON Schema of a recipe, for completion and checks in editors."""

from __future__ import annotations

import argparse
import json


def register(subparsers: argparse._SubParsersAction) -> None:
    schema = subparsers.add_parser("schema", help="print the JSON Schema of a recipe (completion in editors)")
    schema.set_defaults(main=print_schema)


def print_schema(arguments: argparse.Namespace) -> int:
    from terrace.recipe.reference import recipe_json_schema

    print(json.dumps(recipe_json_schema(), indent=2))
    return 0
