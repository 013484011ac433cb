"""`terrace inspect SOURCE|RECIPE:STAGE --out page.html`: a source's samples, or a stage's packs, as the model will see them."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from terrace.data.lines import Lines
from terrace.errors import InputError
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Recipe
from terrace.recipe.shipped import shipped_file

OWN_VOCABULARY = 8_192  # of the tokenizer that is trained where none is named
SOURCE_FIELDS = ("kind", "format", "images_root", "ignore", "exif")
SOURCE_ONLY = ("name", *SOURCE_FIELDS, "endpoint_url", "tokenizer", "pixels", "sequence_length", "data_dir")


class Target(argparse.Action):
    """Keeps SOURCE|RECIPE:STAGE and, of a recipe, its two halves: `cli` draws the demo's scenes for a `recipe`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: Any = None) -> None:
        namespace.target, (namespace.recipe, namespace.stage) = value, split_target(value)


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show a source or a stage as the model sees it, on a page",
        description="Writes one HTML page that needs no network: resized images with the boxes and points of the text, the text with its"
        " supervised tokens marked, the segments of packs, lengths, shares and refused samples. A source is read as a whole (ingest and"
        " index); a stage's data is prepared as for a run.",
    )
    parser.add_argument("target", action=Target, metavar="SOURCE|RECIPE:STAGE", help="rows, shards or s3:// URI; or recipe.yaml:stage")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE", help="the HTML file to write")
    parser.add_argument("--samples", type=int, metavar="N", help="samples to show (default: 12 of a source, none of a stage)")
    parser.add_argument("--packs", type=int, metavar="N", help="packs to show (default: 1 of a source, 3 of a stage)")
    parser.add_argument("--seed", type=int, default=0, help="another number draws other samples")
    stage = parser.add_argument_group("with RECIPE:STAGE")
    stage.add_argument("--run-dir", type=Path, help="use (or make) the data of this run")
    source = parser.add_argument_group("with SOURCE")
    source.add_argument("--name", help="what to call the source (default: its file or folder)")
    source.add_argument("--kind", help="what the samples are: caption, document, qa, ... (default: caption)")
    source.add_argument("--format", help="format of the files (default: told from their names)")
    source.add_argument("--images-root", help="folder that image paths are relative to (default: beside the rows)")
    source.add_argument("--ignore", action="append", metavar="KEY", help="leave this key or tar suffix out (repeatable)")
    source.add_argument("--exif", choices=("apply", "ignore"), help="turn pictures upright (default), or leave them as stored")
    source.add_argument("--endpoint-url", help="S3 endpoint, for servers other than AWS")
    source.add_argument("--tokenizer", help="Hugging Face tokenizer folder (default: a small one, trained on the source)")
    source.add_argument("--pixels", metavar="[MIN,]MAX", help="bounds on the pixels of a resized image (default: 3136,401408)")
    source.add_argument("--sequence-length", type=int, metavar="L", help="tokens of a pack (default: 4096)")
    source.add_argument("--data-dir", help="keep shards and index in this folder, as `--out` of `terrace index` (default: deleted)")
    parser.set_defaults(main=inspect_command)


def inspect_command(args: argparse.Namespace) -> int:
    """Write the page and say what is in it."""
    if min(args.samples or 0, args.packs or 0) < 0:
        raise InputError("terrace inspect: --samples and --packs start at 0")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise InputError(f"--out {args.out}: name a file in a folder that exists")
    if args.recipe is not None:
        return _inspect_recipe(args)
    if args.overrides or args.run_dir:
        raise InputError(f"{args.target} is a source: key.path=value and --run-dir go with a recipe, RECIPE.yaml:STAGE")
    if args.data_dir is not None:
        return _inspect_source(args, args.data_dir)
    with tempfile.TemporaryDirectory(prefix="terrace-inspect-") as folder:
        return _inspect_source(args, folder)


def split_target(target: str) -> tuple[Path | None, str | None]:
    """(recipe file, stage) of RECIPE:STAGE, the stage None where none is named; (None, None) of a source."""
    path, colon, stage = target.rpartition(":")
    if colon and _is_recipe(path):
        return Path(path), stage or None
    return (Path(target), None) if _is_recipe(target) else (None, None)


def _is_recipe(target: str) -> bool:
    return target.endswith((".yaml", ".yml")) or (shipped_file(target) is not None and not Path(target).exists())


def _inspect_recipe(args: argparse.Namespace) -> int:
    from terrace.data.look.order_command import stage_number
    from terrace.data.look.samples import inspect_stage
    from terrace.data.prepare import prepare_data, stage_data
    from terrace.recipe.loading import load_recipe

    given = [name for name in SOURCE_ONLY if getattr(args, name) is not None]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise InputError(f"{option} goes with a source; {args.recipe} says it itself, or takes key.path=value")
    recipe = load_recipe(args.recipe, args.overrides)
    if args.stage is None and len(recipe.stages) > 1:
        names = ", ".join(stage.name for stage in recipe.stages)
        raise InputError(f"name a stage, {args.recipe}:STAGE; the stages of recipe {recipe.name} are {names}")
    number = stage_number(recipe, args.stage) if args.stage is not None else 0
    recipe, prepared = stage_data(recipe, number, prepare_data(recipe, args.run_dir, progress=Lines()))
    samples, packs = _counts(args, samples=0 if OBJECTIVES[recipe.stages[number].objective].reads_packs else 12, packs=3)
    found = inspect_stage(recipe, number, prepared, samples, packs, args.seed)
    stage = recipe.stages[number]
    subtitle = f"Stage {number + 1} of {len(recipe.stages)} of {recipe.name}: packs of {stage.sequence_length:,} tokens"
    tokenizer = "the recipe's tokenizer" if recipe.tokenizer.path else "a tokenizer trained on the recipe's sources"
    return _write(args.out, found, stage.name, subtitle, [f"Tokens are those of {tokenizer}, {found.vocabulary_size:,} entries."])


def _inspect_source(args: argparse.Namespace, folder: str) -> int:
    """The source as the only one of a stage: what a recipe with it would read."""
    from terrace.data.family import family_of
    from terrace.data.index.build import build_index
    from terrace.data.index.source_index import load_index
    from terrace.data.look.samples import inspect_stage
    from terrace.data.prepare import PreparedData, prepare_tokenizer
    from terrace.data.sources.ingest import ingest_source

    recipe = source_recipe(args)
    [(name, source)] = recipe.data.sources.items()
    data, progress = recipe.data, Lines()
    if recipe.tokenizer.path is not None:
        prepare_tokenizer(recipe, {}, folder)  # a wrong one is told before a long ingest
    report = ingest_source(name, source, data, folder, progress)
    tokenizer = prepare_tokenizer(recipe, {name: report}, folder, progress)
    family = tokenizer.fit(family_of(recipe.model))
    index = build_index(name, source, report, tokenizer, family, data.max_image_pixels, data.storage, progress)
    prepared = PreparedData({name: load_index(index, family, storage=data.storage)}, tokenizer.directory, Path(folder), family)
    samples, packs = _counts(args, samples=12, packs=1)
    found = inspect_stage(recipe, 0, prepared, samples, packs, args.seed)
    shards = f"{len(report.shards)} shard{'' if len(report.shards) == 1 else 's'}"
    notes = [f"Tokens are those of {args.tokenizer}, {found.vocabulary_size:,} entries."]
    if args.tokenizer is None:
        notes = [f"Tokens are those of a tokenizer of {found.vocabulary_size:,} entries trained on this source; --tokenizer names another."]
    return _write(args.out, found, name, f"{source.uri} · {report.format}, {shards}", notes)


def source_recipe(args: argparse.Namespace) -> Recipe:
    """A recipe of one stage that reads the source once. Raises InputError for an option that does not fit the schema."""
    name = args.name or _name_of(args.target)
    fields = {field: getattr(args, field) for field in SOURCE_FIELDS if getattr(args, field) is not None}
    tokenizer = {"path": args.tokenizer} if args.tokenizer else {"train_vocabulary_size": OWN_VOCABULARY}
    stage = {
        "name": "inspect", "objective": "grpo" if args.kind == "prompt" else "lm", "mixture": {"weights": {name: 1.0}},
        "train": {"projector": {"lr": 1e-3}}, "budget": {"epochs": 1},
        "pixels": _pixels(args.pixels or "3136,401408"), "sequence_length": args.sequence_length or 4_096, "batch": {"packs": 1},
    }  # fmt: skip
    try:
        return Recipe.model_validate(
            {
                "name": "inspect",
                "model": {"config": {}},
                "tokenizer": tokenizer,
                "data": {"sources": {name: {"uri": args.target, **fields}}, "storage": {"endpoint_url": args.endpoint_url}},
                "stages": [stage],
            }
        )
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        raise InputError(f"terrace inspect {args.target}: {first['loc'][-1]}: {first['msg']}") from error


def _name_of(uri: str) -> str:
    """A source's name from its URI: the file or folder without ending, in the letters that names may have."""
    last = uri.rstrip("/").rpartition("/")[2].split(".")[0]
    name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in last).strip("-")
    return name[:63].strip("-") or "source"


def _pixels(text: str) -> dict[str, int]:
    smallest, comma, largest = text.rpartition(",")
    try:
        pixels = {"min": int(smallest) if comma else min(3136, int(largest)), "max": int(largest)}
    except ValueError as error:
        raise InputError(f"--pixels {text}: give the largest number of pixels of an image, or smallest,largest") from error
    if not 1 <= pixels["min"] <= pixels["max"]:
        raise InputError(f"--pixels {text}: the smallest is at least 1 and at most the largest")
    return pixels


def _counts(args: argparse.Namespace, samples: int, packs: int) -> tuple[int, int]:
    return samples if args.samples is None else args.samples, packs if args.packs is None else args.packs


def _write(path: Path, found: Any, title: str, subtitle: str, notes: list[str]) -> int:
    from terrace.data.look.inspect_page import inspection_page

    # A row's id may hold half a surrogate pair, which no file can.
    content = inspection_page(found, title, subtitle, notes).encode("utf-8", errors="replace")
    path.write_bytes(content)
    print(f"{path}: samples {len(found.samples)}, packs {len(found.packs)}, {len(content) / 2**20:.1f} MB")
    return 0
