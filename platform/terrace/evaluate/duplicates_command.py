"""`terrace duplicates RECIPE`, and `terrace ingest RECIPE --duplicates`: which samples and pictures stand in several sources, and which of

them are asked by evaluation suites.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from terrace.data import command
from terrace.errors import InputError


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "duplicates",
        help="find samples and pictures that stand in several sources, or in an evaluation suite",
        description="Prepares the recipe's data as a run does, and counts, for each two sources and for each source and suite: samples with"
        " the same text and pictures, and pictures that look the same (a difference hash, at most 3 of 64 bits apart). Every picture is"
        " decoded for it.",
    )
    parser.add_argument("recipe", type=Path, help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--run-dir", type=Path, help="use (or make) the data of this run")
    parser.add_argument("--suite", action="append", metavar="KIND:FILE", help="compare with this suite too (default: those of the stages)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per pair")
    parser.set_defaults(main=duplicates_command)
    command.register(subparsers)
    ingest = subparsers.choices["ingest"]
    ingest.add_argument(
        "--duplicates",
        action="store_true",
        help="with a recipe: then index the sources and look for samples and pictures that stand in two of them, or in a suite"
        " (every picture is read and decoded, about 2 ms each)",
    )
    ingest.set_defaults(main=ingest_command)


def ingest_command(args: argparse.Namespace) -> int:
    """Ingest, and with `--duplicates` compare what was ingested."""
    if not args.duplicates:
        return command.ingest_command(args)
    if args.recipe is None and args.uri is not None:
        raise InputError("--duplicates compares the sources and suites of a recipe; name one instead of --uri")
    if args.source:
        raise InputError("--duplicates compares all sources of the recipe; leave --source out")
    code = command.ingest_command(args)
    if args.out:
        args.overrides = [*args.overrides, f"data.cache_dir={json.dumps(args.out)}"]
    args.suite = None
    return code or duplicates_command(args)


def duplicates_command(args: argparse.Namespace) -> int:
    """Count and print; 0 whatever is found."""
    from terrace.data.lines import Lines
    from terrace.data.prepare import prepare_data
    from terrace.recipe.loading import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    suites = list(dict.fromkeys(args.suite or [suite for stage in recipe.stages for suite in stage.evaluate.suites]))
    indexes = prepare_data(recipe, args.run_dir, progress=Lines()).sources
    found = compare(indexes, {suite: suite_pictures(suite, recipe) for suite in suites})
    for pair in found:
        print(json.dumps(pair) if args.json else _sentence(pair))
    if not found and not args.json:
        print(f"no sample and no picture stands in two of {', '.join([*indexes, *suites])}")
    return 0


def compare(indexes: dict[str, Any], suites: dict[str, list[bytes]]) -> list[dict[str, Any]]:
    """A pair for each two sources, and each source and suite, that share something."""
    from terrace.data.index.content import overlaps
    from terrace.data.look.near import near_ones, picture_print, source_prints

    same = overlaps(indexes)
    prints = {name: source_prints(index) for name, index in indexes.items()}
    asked = {suite: [picture_print(picture) for picture in pictures] for suite, pictures in suites.items()}
    prints |= {suite: np.unique(np.asarray([one for one in found if one is not None], np.uint64)) for suite, found in asked.items()}
    names, pairs = list(prints), []
    for place, name in enumerate(names):
        if name in suites:
            break
        for other in names[place:]:
            near = near_ones(prints[name], prints[other]) if other != name else 0
            if same[name, other] or near:
                counts = {"same_samples": same[name, other], "near_pictures": near}
                pairs.append({"one": name, "other": other, "suite": other in suites, **counts})
    return pairs


def suite_pictures(suite: str, recipe: Any) -> list[bytes]:
    """The encoded pictures of a suite's cases."""
    from terrace.data.family import family_of
    from terrace.evaluate.suites import Reading, load_suites
    from terrace.families.interface import Sight

    stage = recipe.stages[-1]
    try:
        [loaded] = load_suites([suite], Reading(Sight(family_of(recipe.model), (stage.pixels.min, stage.pixels.max))))
    except ValueError as error:
        raise InputError(f"suite {suite}: {error}") from error
    return [picture for case in loaded.cases for picture in case.read_images()]


def _sentence(pair: dict[str, Any]) -> str:
    if pair["one"] == pair["other"]:
        return f"{pair['one']}: {pair['same_samples']:,} samples repeat others of it"
    told = [f"{pair['same_samples']:,} samples are the same"] if pair["same_samples"] else []
    told += [f"{pair['near_pictures']:,} pictures look the same"] if pair["near_pictures"] else []
    what = "suite " if pair["suite"] else ""
    return f"{pair['one']} and {what}{pair['other']}: {', '.join(told)}"
