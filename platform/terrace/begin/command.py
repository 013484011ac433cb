"""`terrace init DIR --from CHECKPOINT --data ROWS...`: a recipe for a checkpoint and rows, with what was decided and why."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from terrace.begin.place import check_place
from terrace.errors import InputError

STAGES = ("sft", "warmup+sft", "curriculum", "morl")


def register(subparsers: argparse._SubParsersAction) -> None:
    init = subparsers.add_parser(
        "init",
        help="write a recipe for your checkpoint and your rows",
        description="Looks at a checkpoint in the hub's layout and at rows (JSON Lines, JSON, Parquet, CSV, folders of pictures,"
        " dataset_info.json), and writes DIR/recipe.yaml with every decision and its reason.",
    )
    init.add_argument("directory", type=Path, metavar="DIR", help="where recipe.yaml goes")
    init.add_argument(
        "--from", dest="checkpoint", required=True, metavar="CHECKPOINT", help="model directory in the hub's layout, or s3:// URI"
    )
    init.add_argument("--data", nargs="+", required=True, metavar="ROWS", help="files, folders or s3:// URIs of rows")
    init.add_argument("--stages", choices=STAGES, default="sft", help="what the curriculum is (sft)")
    init.add_argument("--name", help="of the curriculum (default: the folder's name)")
    init.add_argument("--force", action="store_true", help="write over a recipe that is there")
    init.set_defaults(main=init_command)


def init_command(arguments: argparse.Namespace) -> int:
    check_place(arguments.checkpoint)
    from terrace.begin.checkpoint import look_at_checkpoint, tokenizer_of
    from terrace.begin.decide import decide, recipe_values
    from terrace.begin.machine import fitted, this_machine
    from terrace.begin.rows import look_at
    from terrace.begin.write import recipe_text
    from terrace.data.sources.kinds import source_name
    from terrace.planner.render import print_plan
    from terrace.recipe.loading import load_recipe

    file = arguments.directory / "recipe.yaml"
    if file.exists() and not arguments.force:
        raise InputError(f"{file} is there already; name another folder, or write over it with --force")
    checkpoint = look_at_checkpoint(arguments.checkpoint)
    tokenizer = tokenizer_of(checkpoint.directory)
    sources: list = []
    for uri in arguments.data:
        source = look_at(uri, [found.name for found in sources], tokenizer, checkpoint.family)
        sources.append(source)
        print(f"{uri}: {'' if source.exact else 'about '}{source.rows:,} rows, {source.kind} ({source.format}), as source `{source.name}`")
        if source.refused:
            opened = len(source.measures) + sum(source.refused.values())
            print(f"  of {opened} that were opened {_refused(source.refused)}; {source.example}")
    machine = this_machine()
    choice = decide(checkpoint, sources, arguments.stages, machine)
    name = arguments.name or source_name(arguments.directory.resolve().name)
    values, plan, told = fitted(recipe_values(name, checkpoint, sources, choice), machine)
    decided = [*choice.told, *told]
    print()
    for what, why in decided:
        print(f"  {what:<10} {why}")
    command = "terrace init " + shlex.join([str(arguments.directory), "--from", arguments.checkpoint, "--data", *arguments.data])
    command += f" --stages {arguments.stages}" if arguments.stages != "sft" else ""
    try:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        file.write_text(recipe_text(values, decided, command, str(file)), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from error
    load_recipe(file)
    if machine.gpus:
        print()
        print_plan(plan)
    run = arguments.directory / "run"
    print(f"\n{file} is written. Then:")
    last = f":{choice.stages[-1].name}" if len(choice.stages) > 1 else ""
    plans = [f"terrace plan {file} --index"] if machine.gpus else []
    looks = [f"terrace validate {file}", *plans, f"terrace inspect {file}{last}"]
    for line in (*looks, f"terrace run {file} --run-dir {run}", f"terrace chat {run}"):
        print(f"  {line}")
    return 0


def _refused(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} refused ({reason})" for reason, count in reasons.items())
