"""`terrace ingest` and `terrace index`: a recipe's sources, or one folder named on the command line, into shards and indexes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from terrace.data.lines import Lines
from terrace.data.look import order_command
from terrace.errors import InputError
from terrace.recipe.schema import Data, Source

SHOWN_REFUSALS = 5


def register(subparsers: argparse._SubParsersAction) -> None:
    ingest = subparsers.add_parser(
        "ingest",
        help="turn raw rows and images into shards",
        description="Checks every sample, writes WebDataset tars, and lists what was refused and why in refused.jsonl."
        " Unchanged sources are not read again.",
    )
    _add_source_arguments(ingest)
    ingest.set_defaults(main=ingest_command)
    index = subparsers.add_parser(
        "index",
        help="index shards where they lie",
        description="Writes the Parquet index of each source (ingesting raw rows first): where each sample's bytes lie and"
        " how many tokens it has at any resolution.",
    )
    _add_source_arguments(index)
    index.add_argument("--tokenizer", help="with --uri: Hugging Face tokenizer folder")
    index.add_argument("--architecture", default="qwen2_5_vl", help="with --uri: family whose form the samples take (default: qwen2_5_vl)")
    index.set_defaults(main=index_command)
    order_command.register(subparsers)


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, help="recipe file (YAML); or give --uri")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--source", action="append", metavar="NAME", help="only this source of the recipe (repeatable)")
    parser.add_argument("--uri", help="without a recipe: folder, file, glob or s3:// URI of one source")
    parser.add_argument("--name", default="source", help="with --uri: the source's name")
    parser.add_argument("--kind", default="caption", help="with --uri: what the samples are (caption, document, qa, ...)")
    parser.add_argument("--format", default="auto", help="with --uri: format of the files (default: told from their names)")
    parser.add_argument("--images-root", help="with --uri: folder that image paths are relative to (default: beside the rows)")
    parser.add_argument("--endpoint-url", help="with --uri: S3 endpoint, for servers other than AWS")
    parser.add_argument("--run-dir", type=Path, help="put the data where this run looks for it")
    parser.add_argument("--out", help="folder or s3:// URI for shards and indexes")
    parser.add_argument("--json", action="store_true", help="print one JSON object per source")


def ingest_command(args: argparse.Namespace) -> int:
    """Ingest every chosen source; sources that cannot be used are named at the end."""
    from terrace.data.sources.ingest import ingest_source

    data, out, _ = _chosen(args)

    def one(name: str) -> dict[str, Any]:
        report = ingest_source(name, data.sources[name], data, out, Lines())
        return {
            "source": name, "format": report.format, "samples": None if report.in_place else report.samples,
            "shards": len(report.shards), "rewritten": report.rewritten, "refused": report.refused, "folder": report.folder,
            "unchanged": report.reused,
        }  # fmt: skip

    return _each(args, data, one)


def index_command(args: argparse.Namespace) -> int:
    """Index every chosen source, ingesting first what needs it."""
    from terrace.data.family import family_of
    from terrace.data.index.build import build_index, load_summary
    from terrace.data.prepare import prepare_tokenizer
    from terrace.data.sources.ingest import ingest_source
    from terrace.data.tokenizer import load_tokenizer
    from terrace.families.registry import make_family
    from terrace.storage.files import absolute

    data, out, recipe = _chosen(args)
    progress = Lines()
    if recipe is None:
        if args.tokenizer is None:
            raise InputError("terrace index --uri: name the tokenizer folder with --tokenizer; token counts depend on it")
        tokenizer, family = load_tokenizer(absolute(args.tokenizer)), make_family(args.architecture, {})
    else:
        # A tokenizer that is trained needs the text of every source, whichever of them is to be indexed now.
        trained = recipe.tokenizer.path is None
        reports = {name: ingest_source(name, data.sources[name], data, out, progress) for name in data.sources if trained}
        tokenizer, family = prepare_tokenizer(recipe, reports, out, progress), family_of(recipe.model)

    def one(name: str) -> dict[str, Any]:
        source = data.sources[name]
        report = ingest_source(name, source, data, out, progress)
        folder = build_index(name, source, report, tokenizer, family, data.max_image_pixels, data.storage, progress)
        summary = load_summary(folder, data.storage)
        assert summary is not None
        return {
            "source": name, "format": report.format, "samples": summary["samples"], "shards": len(report.shards),
            "rewritten": report.rewritten, "refused": summary["refused"], "folder": folder, "unchanged": False,
        }  # fmt: skip

    return _each(args, data, one)


# ---------------------------------------------------------------- shared


def _chosen(args: argparse.Namespace) -> tuple[Data, str, Any]:
    """(data section, output folder, recipe or None) of the command line."""
    from terrace.data.prepare import default_root
    from terrace.recipe.loading import load_recipe

    if (args.recipe is None) == (args.uri is None):
        raise InputError("give either a recipe file or --uri")
    if args.uri is not None:
        if args.out is None:
            raise InputError("with --uri, name the folder for the result with --out")
        try:
            source = Source(uri=args.uri, kind=args.kind, format=args.format, images_root=args.images_root)
            data = Data(sources={args.name: source}, storage={"endpoint_url": args.endpoint_url})
        except ValueError as error:
            raise InputError(f"--uri: {error}") from error
        return data, args.out, None
    recipe = load_recipe(args.recipe, args.overrides)
    out = args.out or recipe.data.cache_dir or str(args.run_dir / "data" if args.run_dir else default_root(recipe))
    unknown = sorted(set(args.source or []) - set(recipe.data.sources))
    if unknown:
        raise InputError(f"--source {unknown[0]}: the recipe's sources are {', '.join(recipe.data.sources)}")
    return recipe.data, out, recipe


def _each(args: argparse.Namespace, data: Data, one: Any) -> int:
    """Run `one` over the chosen sources and print what became of each; the first unusable source is raised at the end."""
    failures: list[InputError] = []
    for name in args.source or list(data.sources):
        try:
            facts = one(name)
        except InputError as error:
            failures.append(error)
            if len(data.sources) > 1:
                print(f"{name}: {error}", file=sys.stderr)
            continue
        print(json.dumps(facts) if args.json else _sentence(facts))
        if facts["refused"] and not args.json:
            _show_refusals(facts["folder"], data)
    if failures:
        raise failures[0]
    return 0


def _sentence(facts: dict[str, Any]) -> str:
    refused = facts["refused"]
    samples = "indexed where it lies" if facts["samples"] is None else f"{facts['samples']:,} samples"
    told = f"{facts['source']}: {samples}, {facts['shards']} shard{'' if facts['shards'] == 1 else 's'} ({facts['format']})"
    if facts["rewritten"]:
        told += f", {facts['rewritten']} of them compressed and rewritten"
    if refused:
        told += f"; {sum(refused.values())} refused: " + ", ".join(f"{count} {reason}" for reason, count in refused.items())
    return told + (" [unchanged]" if facts["unchanged"] else "") + f" -> {facts['folder']}"


def _show_refusals(folder: str, data: Data) -> None:
    from terrace.data.sources.ingest import iter_refused

    lines = list(iter_refused(folder, data.storage))
    for line in lines[:SHOWN_REFUSALS]:
        print(f"  refused {line.origin} ({line.id}): {line.reason}: {line.detail}", file=sys.stderr)
    if len(lines) > SHOWN_REFUSALS:
        print(f"  ... and {len(lines) - SHOWN_REFUSALS} more in {folder}/refused.jsonl", file=sys.stderr)
