"""`terrace ingest` and `terrace index`: a recipe's sources, or one folder named on the command line, into shards and indexes."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from terrace.data.lines import Lines
from terrace.data.look import order_command
from terrace.data.sources.kinds import source_name
from terrace.errors import InputError
from terrace.recipe.schema import Data, Source, Storage

DETAIL_CHARACTERS = 160  # of a refusal's sentence in the table


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
    parser.add_argument("recipe", nargs="?", type=Path, help="recipe file (YAML), or rows: a file or folder, as with --uri")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--source", action="append", metavar="NAME", help="only this source of the recipe (repeatable)")
    parser.add_argument("--uri", help="without a recipe: folder, file, glob or s3:// URI of one source")
    parser.add_argument("--name", default="source", help="with --uri: the source's name")
    parser.add_argument("--kind", help="with --uri: what the samples are (default: told from the first rows, otherwise caption)")
    parser.add_argument("--format", default="auto", help="with --uri: format of the files (default: told from their names)")
    parser.add_argument("--images-root", help="with --uri: folder that image paths are relative to (default: beside the rows)")
    parser.add_argument("--ignore", action="append", metavar="KEY", help="with --uri: leave this key or tar suffix out (repeatable)")
    parser.add_argument("--exif", choices=("apply", "ignore"), help="with --uri: turn pictures upright, or leave them as stored")
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
            "unchanged": report.reused, "ignored": report.ignored, "rotated": report.rotated, "renamed": report.renamed,
            "spelled": report.spelled,
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
    family = tokenizer.fit(family)

    folders: dict[str, str] = {}

    def one(name: str) -> dict[str, Any]:
        source = data.sources[name]
        report = ingest_source(name, source, data, out, progress)
        folder = build_index(name, source, report, tokenizer, family, data.max_image_pixels, data.storage, progress)
        folders[name] = folder
        summary = load_summary(folder, data.storage)
        assert summary is not None
        return {
            "source": name, "format": report.format, "samples": summary["samples"], "shards": len(report.shards),
            "rewritten": report.rewritten, "refused": summary["refused"], "folder": folder, "unchanged": False,
            **{name: summary[name] for name in ("ignored", "rotated", "renamed", "spelled")},
        }  # fmt: skip

    code = _each(args, data, one)
    if not args.json:
        for line in _overlaps(folders, family, data):
            print(line)
    return code


def _overlaps(folders: dict[str, str], family: Any, data: Data) -> list[str]:
    """Which sources hold the same samples, by text and pictures."""
    from terrace.data.index.content import overlaps
    from terrace.data.index.source_index import load_index

    told = "left out of training" if data.deduplicate == "drop" else "and are trained each time; `data.deduplicate: drop` leaves them out"
    counts = overlaps({name: load_index(folder, family, storage=data.storage) for name, folder in folders.items()})
    return [
        f"{count:,} samples of {other} " + ("repeat others of it" if name == other else f"stand in {name} too") + f", {told}"
        for (name, other), count in counts.items()
    ]


# ---------------------------------------------------------------- shared


def _chosen(args: argparse.Namespace) -> tuple[Data, str, Any]:
    """(data section, output folder, recipe or None) of the command line."""
    from terrace.data.prepare import default_root
    from terrace.recipe.loading import load_recipe

    if args.recipe is not None and args.uri is None and is_rows(args.recipe):
        args.uri, args.recipe = re.sub("^s3:/+", "s3://", str(args.recipe)), None
        if args.overrides:
            raise InputError(f"{args.overrides[0]}: changes go with a recipe; of rows the options say everything")
        if args.name == "source":
            args.name = source_name(Path(args.uri).name.partition(".")[0])
        args.out = args.out or f"{args.name}-shards"
    if (args.recipe is None) == (args.uri is None):
        raise InputError("give either a recipe file or --uri")
    if args.uri is not None:
        if args.out is None:
            raise InputError("with --uri, name the folder for the result with --out")
        args.kind = args.kind or told_kind(args.uri, args.endpoint_url)
        try:
            source = source_of(args)
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


def is_rows(path: Path) -> bool:
    """Whether what stands where a recipe may is rows: a folder, a file of another name than recipes have, or what is named like rows."""
    from terrace.recipe.loading import ROWS

    named = path.suffix.lower() in ROWS or str(path).startswith("s3:/")
    return named or path.is_dir() or (path.is_file() and path.suffix.lower() not in (".yaml", ".yml"))


def told_kind(uri: str, endpoint_url: str | None = None) -> str:
    """The kind that a source's first rows speak for; `caption` where they do not say, so that ingest names what is wrong."""
    from terrace.data.sources.kinds import kind_of_source

    kind = kind_of_source(uri, Storage(endpoint_url=endpoint_url))
    return "caption" if kind in ("empty", "unknown") else kind


def source_of(args: argparse.Namespace) -> Source:
    """The one source that a command line names. Raises ValueError for values that the schema does not know."""
    given = {"kind": args.kind, "format": args.format, "images_root": args.images_root, "ignore": args.ignore, "exif": args.exif}
    return Source(uri=args.uri, **{name: value for name, value in given.items() if value is not None})


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
        print(json.dumps(facts) if args.json else "\n".join([_sentence(facts), *_table(facts, data)]))
    if failures:
        raise failures[0]
    return 0


def _sentence(facts: dict[str, Any]) -> str:
    samples = "indexed where it lies" if facts["samples"] is None else f"{facts['samples']:,} samples"
    told = f"{facts['source']}: {samples}, {facts['shards']} shard{'' if facts['shards'] == 1 else 's'} ({facts['format']})"
    if facts["rewritten"]:
        told += f", {facts['rewritten']} of them compressed and rewritten"
    return told + (" [unchanged]" if facts["unchanged"] else "") + f" -> {facts['folder']}"


def _table(facts: dict[str, Any], data: Data) -> list[str]:
    """What became of the source's rows: read, refused by reason with an example of each, left out by `ignore`."""
    refused = facts["refused"]
    lines = [] if facts["samples"] is None else [_line("read", facts["samples"])]
    if refused:
        lines.append(_line("refused", sum(refused.values()), f"all of them in {facts['folder']}/refused.jsonl"))
        examples = _examples(facts["folder"], data)
        lines += [_line(f"  {reason}", count, examples.get(reason, "")) for reason, count in refused.items()]
    lines += [_line(f"ignored: {entry}", count) for entry, count in facts["ignored"].items()]
    if facts["renamed"]:
        lines.append(_line("ids of several samples", facts["renamed"], "in the index the later ones have a suffix: id-2, id-3"))
    if facts["spelled"]:
        told = "letters" if data.sources[facts["source"]].special_tokens == "text" else "tokens"
        lines.append(_line("texts with <|...|>", facts["spelled"], f"special tokens in them are {told} (special_tokens)"))
    if facts["rotated"]:
        exif = data.sources[facts["source"]].exif
        told = "turned upright" if exif == "apply" else "left as stored (exif: ignore)"
        lines.append(_line("pictures EXIF turns", facts["rotated"], told))
    return lines


def _line(what: str, count: int, told: str = "") -> str:
    return f"  {what:<26}{count:>12,}  {told}".rstrip()


def _examples(folder: str, data: Data) -> dict[str, str]:
    """The first refused row of each reason."""
    from terrace.data.sources.ingest import iter_refused

    examples: dict[str, str] = {}
    for line in iter_refused(folder, data.storage):
        if line.reason not in examples:
            detail = line.detail if len(line.detail) <= DETAIL_CHARACTERS else line.detail[:DETAIL_CHARACTERS] + "..."
            examples[line.reason] = f"{line.origin}: {detail}"
    return examples
