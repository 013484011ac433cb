"""`terrace recipes list|show|copy`: the recipes that come with Terrace, to read and to start one's own from."""

from __future__ import annotations

import argparse
from pathlib import Path

from terrace.errors import InputError, nearest


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "recipes",
        help="list, show or copy the recipes that come with Terrace",
        description="Recipes of published systems, in the package. A short name stands where a recipe's file does: `terrace plan"
        " mimo-vl-7b`, `extends: mimo-vl-7b`.",
    )
    parser.add_argument(
        "action", nargs="?", default="list", choices=("list", "show", "copy"),
        help="list them (default), print one as it is written, or copy one to change it",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of show and copy: a name from the list")
    parser.add_argument("to", nargs="?", type=Path, metavar="TO", help="of copy: a file or folder; default: NAME.yaml here")
    parser.add_argument("--resolved", action="store_true", help="of show: with what it extends and every default written out")
    parser.set_defaults(main=recipes_command)


def recipes_command(arguments: argparse.Namespace) -> int:
    if arguments.action == "list":
        for line in list_lines():
            print(line)
        return 0
    file = _named(arguments)
    if arguments.action == "copy":
        print(f"wrote {copy(file, arguments.to or Path())}")
        return 0
    if arguments.resolved:
        from terrace.recipe.loading import dump_recipe, load_recipe

        print(dump_recipe(load_recipe(file)), end="")
    else:
        print(file.read_text(encoding="utf-8"), end="")
    return 0


def list_lines() -> list[str]:
    """One line for each shipped recipe: its name, its family, how many stages, and what it says it is."""
    from terrace.recipe import shipped
    from terrace.recipe.loading import load_recipe

    rows = []
    for name in shipped.names():
        recipe = load_recipe(name)
        stages = f"{len(recipe.stages)} stage{'s' * (len(recipe.stages) > 1)}"
        rows.append((name, recipe.model.architecture, stages, recipe.description))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join([*(word.ljust(width) for word, width in zip(row, widths)), row[3]]) for row in rows]


def copy(file: Path, to: Path) -> Path:
    """Copies a shipped recipe to a file or into a folder; what it extends is found by name from there. Nothing is overwritten."""
    target = to / file.name if to.is_dir() else to
    if target.exists():
        raise InputError(f"{target} exists; name another file: `terrace recipes copy {file.stem} FILE`")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.read_bytes())
    return target


def _named(arguments: argparse.Namespace) -> Path:
    from terrace.recipe import shipped

    if arguments.name is None:
        raise InputError(f"name the recipe: `terrace recipes {arguments.action} NAME`; `terrace recipes list` shows them")
    file = shipped.shipped_file(arguments.name.removesuffix(shipped.SUFFIX))
    if file is None:
        near = nearest(arguments.name, shipped.names(), limit=0)
        raise InputError(f"no recipe {arguments.name} is shipped{near} (`terrace recipes list`)")
    return file
