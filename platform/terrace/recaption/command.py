"""`terrace recaption RECIPE`: new captions for the pictures of sources, as the recipe's section `recaption` says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from terrace.errors import InputError, nearest


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "recaption",
        help="caption pictures with one model, keep what another finds fitting",
        description="Does what `recaption` of the recipe says: reads a source's samples, has a model write captions, keeps those that"
        " another model finds fitting, and writes shards that a source can name. Killed, it goes on where it was; what was refused is"
        " listed in refused.jsonl.",
    )
    parser.add_argument("recipe", type=Path, help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--name", action="append", metavar="NAME", help="only this entry of `recaption` (repeatable)")
    parser.add_argument("--run-dir", type=Path, help="use (or make) the ingested rows of this run")
    parser.add_argument("--batch-size", type=_count, default=16, metavar="N", help="pictures that are captioned or judged together (16)")
    parser.add_argument(
        "--workers", type=_count, default=1, metavar="N", help="processes, each with its own GPU where there are several (1)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--engine", choices=("native", "vllm"), default="native", help="what the captioner decodes with (native)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per entry")
    parser.set_defaults(main=recaption_command)


def recaption_command(args: argparse.Namespace) -> int:
    """Every chosen entry, in order."""
    from terrace.data.lines import Lines
    from terrace.data.prepare import default_root
    from terrace.data.sources.ingest import ingest_source
    from terrace.evaluate.replies import Settings
    from terrace.recaption.run import Job, run
    from terrace.recipe.loading import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if not recipe.recaption:
        raise InputError(f"{args.recipe}: it has no section `recaption`; docs/data.md shows one")
    names = args.name or list(recipe.recaption)
    if unknown := [name for name in names if name not in recipe.recaption]:
        raise InputError(f"--name {unknown[0]}: the recipe's `recaption` has no such entry{nearest(unknown[0], recipe.recaption)}")
    out = recipe.data.cache_dir or str(args.run_dir / "data" if args.run_dir else default_root(recipe))
    settings = Settings(batch_size=args.batch_size, workers=args.workers, device=args.device, precision=args.precision, engine=args.engine)
    for name in names:
        wanted = recipe.recaption[name]
        source = recipe.data.sources[wanted.source]
        report = ingest_source(wanted.source, source, recipe.data, out, Lines())
        counts = run(Job(name, wanted, source, recipe.data, report, settings), Lines())
        print(json.dumps(counts) if args.json else told(counts))
    return 0


def told(counts: dict[str, Any]) -> str:
    """The counts of an entry in words."""
    kept = " and ".join(f"{count:,} {whose}" for whose, count in counts["kept"].items())
    refused = ", ".join(f"{count:,} {reason}" for reason, count in counts["refused"].items()) or "none"
    return (
        f"{counts['name']}: {counts['pictures']:,} pictures of {counts['samples']:,} samples of {counts['source']}; captions kept: {kept};"
        f" refused: {refused}\n  a source of them: {{uri: {counts['shards']}/, kind: caption}}"
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
