"""`terrace run|validate|status|logs|pause|suspend|resume|cancel`: from the command line to the curriculum and back."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from terrace.cluster.ranks import by_torchrun
from terrace.curriculum import on_kubernetes
from terrace.errors import InputError
from terrace.storage import mirror

LAUNCHERS = ("local", "process", "ray", "ranks", "kubernetes")
RUN_HELP = "directory of the run, s3://BUCKET/PREFIX, or k8s://NAMESPACE/NAME"
RERUN_HELP = "run this stage and those after it again from their beginning; what they wrote is moved aside"


def register(subparsers: argparse._SubParsersAction) -> None:
    run = subparsers.add_parser(
        "run",
        help="run a recipe's stages, or continue where an earlier run stopped",
        description="Run all stages of a recipe. The same command again continues a run that was stopped or killed.",
    )
    run.add_argument("recipe", help="recipe file (YAML)")
    run.add_argument("--run-dir", type=run_directory, help="directory of the run: recipe, journal, data, stages; or s3://BUCKET/PREFIX")
    run.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.path=value",
        help="changes to the recipe, for example stages.0.budget.steps=50",
    )
    single = run.add_argument_group("one attempt of one stage", "what a cluster's controller starts; not for hands")
    single.add_argument("--stage", help="run this stage only, and record nothing but its files")
    single.add_argument("--attempt", type=int, help="number of the attempt, which fences older ones")
    single.add_argument("--rerun", type=int, default=0, help="move what earlier runs of the stage wrote aside first")
    run.add_argument("--from", dest="from_stage", metavar="STAGE", help=RERUN_HELP)
    _launcher_options(run)
    run.set_defaults(main=run_command)

    validate = subparsers.add_parser("validate", help="check a recipe and print its stages and parameter counts")
    validate.add_argument("recipe", type=Path)
    validate.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    validate.add_argument("--offline", action="store_true", help="do not look whether sources, checkpoints and suites are there")
    validate.add_argument("--json", action="store_true", help="print the facts as JSON")
    validate.set_defaults(main=validate_command)

    status = subparsers.add_parser("status", help="show a run's stages, steps, losses and checkpoints")
    status.add_argument("run_dir", type=run_name, help=RUN_HELP)
    status.add_argument("--json", action="store_true")
    status.set_defaults(main=status_command)

    logs = subparsers.add_parser("logs", help="show what the workers of a stage attempt logged")
    logs.add_argument("run_dir", type=run_name, help=RUN_HELP)
    logs.add_argument("--stage", help="stage name; default: the newest one with a log")
    logs.add_argument("--rank", type=int, default=0)
    logs.add_argument("--follow", "-f", action="store_true", help="keep printing until the run ends or Ctrl-C")
    logs.set_defaults(main=logs_command)

    for name, text in (
        ("pause", "finish the stage in flight and start no other"),
        ("suspend", "checkpoint now, end the stage in flight and release everything"),
        ("cancel", "end the run for good"),
    ):
        parser = subparsers.add_parser(name, help=text)
        parser.add_argument("run_dir", type=run_name, help=RUN_HELP)
        parser.set_defaults(main=request_command, request=f"{name}_requested")

    resume = subparsers.add_parser("resume", help="continue a paused, suspended or failed run, or run again from a stage")
    resume.add_argument("run_dir", type=run_name, help=RUN_HELP)
    resume.add_argument(
        "--from",
        dest="from_stage",
        metavar="STAGE",
        help=RERUN_HELP,
    )
    _launcher_options(resume)
    resume.set_defaults(main=resume_command)


def _launcher_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="ranks" if by_torchrun() else "local",
        help="local: Ray in this process (default); process: processes on this machine, without Ray; ray: jobs on a running Ray cluster;"
        " ranks: the processes that torchrun or srun"
        " started, without Ray (default under torchrun); kubernetes: a Curriculum",
    )
    parser.add_argument("--address", help="launcher ray: the cluster's dashboard, for example http://127.0.0.1:8265")
    parser.add_argument("--cluster", type=Path, help="launcher kubernetes: cluster file (runtime, storage, queue)")
    parser.add_argument("--name", help="launcher kubernetes: name of the Curriculum; default: the recipe's")
    parser.add_argument("--namespace", "-n", help="launcher kubernetes: namespace; default: the kubeconfig's")
    parser.add_argument("--dashboard", action="store_true", help="launcher local: start Ray's dashboard too")


def run_directory(text: str) -> str:
    """A folder that this machine and, on a cluster, every worker sees at the same path, or a place on S3; `mirror.open_run` opens it."""
    if "://" in text and not mirror.is_stored(text):
        raise InputError(f"--run-dir {text}: a run directory is a folder (on a cluster one that all machines share) or s3://BUCKET/PREFIX")
    return text


def run_name(text: str) -> str:
    return text if on_kubernetes.is_reference(text) else run_directory(text)


def recipe_file(text: str) -> Path:
    """A recipe on this disk, or the one that a run on S3 keeps (what a job of that run is given)."""
    if not mirror.is_stored(text):
        return Path(text)
    run, _, name = text.rpartition("/")
    return mirror.open_run(run) / name


def run_command(arguments: argparse.Namespace) -> int:
    if arguments.launcher == "ranks" and not arguments.stage:
        return _led(lambda: _run(arguments))
    return _run(arguments)


def _led(command: Callable[[], int]) -> int:
    from terrace.cluster.ranks_worker import led
    from terrace.curriculum.attempt_worker import run_in_worker

    return led(command, run_in_worker)


def _run(arguments: argparse.Namespace) -> int:
    from terrace.recipe.loading import load_recipe

    recipe = load_recipe(recipe_file(arguments.recipe), arguments.overrides)
    if arguments.launcher == "kubernetes":
        return on_kubernetes.run(recipe, arguments)
    if arguments.run_dir is None:
        raise InputError("name the run's directory: --run-dir DIR")
    arguments.run_dir = mirror.open_run(arguments.run_dir)
    if arguments.stage or arguments.attempt:
        from terrace.curriculum.single import run_single_attempt

        if not (arguments.stage and arguments.attempt):
            raise InputError("--stage and --attempt belong together")
        return run_single_attempt(recipe, arguments.run_dir, arguments.stage, arguments.attempt, arguments.rerun)
    _refuse_what_is_missing(recipe, arguments)
    return _control(recipe, arguments, _rerun(arguments))


def _refuse_what_is_missing(recipe: Any, arguments: argparse.Namespace) -> None:
    """Before anything of a new run is written: each key that names a file or folder which this machine lacks. Buckets are asked in their
    time, with patience; a cluster's jobs may see folders that this machine does not."""
    from terrace.curriculum.journal import read_journal
    from terrace.curriculum.validate_inputs import missing_inputs
    from terrace.recipe.errors import RecipeError
    from terrace.recipe.loading import placed

    if arguments.launcher == "ray" or (arguments.run_dir.is_dir() and read_journal(arguments.run_dir).events):
        return
    if missing := missing_inputs(recipe, remote=False):
        file = recipe_file(arguments.recipe)
        raise RecipeError(placed(missing, file, arguments.overrides), str(file))


def _rerun(arguments: argparse.Namespace) -> dict[str, Any] | None:
    return {"event": "rerun_requested", "stage": arguments.from_stage} if arguments.from_stage else None


def resume_command(arguments: argparse.Namespace) -> int:
    return _led(lambda: _resume(arguments)) if arguments.launcher == "ranks" else _resume(arguments)


def _resume(arguments: argparse.Namespace) -> int:
    from terrace.curriculum.journal import read_journal
    from terrace.curriculum.run_directory import require_run
    from terrace.curriculum.state import fold

    if on_kubernetes.is_reference(arguments.run_dir):
        return on_kubernetes.wish(arguments.run_dir, "resume", arguments.from_stage)
    arguments.run_dir = mirror.open_run(arguments.run_dir)
    recipe = require_run(arguments.run_dir)
    if arguments.from_stage:
        return _control(recipe, arguments, _rerun(arguments))
    state = fold([stage.name for stage in recipe.stages], read_journal(arguments.run_dir).events)
    if state.phase == "cancelled":
        raise InputError(f"{mirror.place_of(arguments.run_dir)} was cancelled, which is for good; --from STAGE runs stages again")
    waits = state.phase in ("paused", "suspended", "failed")
    return _control(recipe, arguments, {"event": "resume_requested"} if waits else None)


def _control(recipe: Any, arguments: argparse.Namespace, request: dict[str, Any] | None) -> int:
    from terrace.curriculum.launch import run_with_launcher

    outcome = run_with_launcher(
        recipe,
        arguments.run_dir,
        arguments.launcher,
        request=request,
        address=arguments.address,
        dashboard=arguments.dashboard,
    )
    stream = sys.stdout if outcome.exit_status == 0 else sys.stderr
    print(outcome.message, file=stream)
    return outcome.exit_status


def validate_command(arguments: argparse.Namespace) -> int:
    from terrace.curriculum.validate import describe_recipe, print_description
    from terrace.curriculum.validate_inputs import missing_inputs
    from terrace.recipe.errors import RecipeError
    from terrace.recipe.loading import load_recipe, placed
    from terrace.recipe.questions import questions

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not arguments.offline and (missing := missing_inputs(recipe)):
        raise RecipeError(placed(missing, arguments.recipe, arguments.overrides), str(arguments.recipe))
    asked = [str(question) for question in placed(questions(recipe), arguments.recipe, arguments.overrides)]
    try:
        description = {**describe_recipe(recipe), "questions": asked}
    except InputError:
        if not arguments.offline or recipe.model.pretrained is None:
            raise
        description = {"name": recipe.name, "stages": [stage.name for stage in recipe.stages], "questions": asked}
    if arguments.json:
        print(json.dumps(description, indent=2))
        return 0
    if "parameters" in description:
        print_description(description)
    else:
        print(f"{recipe.name} is valid: {len(recipe.stages)} stages; its model is not here, so its parameters are not counted")
    for question in asked:
        print(f"question: {question}")
    return 0


def status_command(arguments: argparse.Namespace) -> int:
    from terrace.curriculum.status import print_status, run_status

    if on_kubernetes.is_reference(arguments.run_dir):
        return on_kubernetes.status(arguments.run_dir, arguments.json)
    status = run_status(mirror.open_run(arguments.run_dir))
    if arguments.json:
        print(json.dumps(status, indent=2))
    else:
        print_status(status)
    return 0


def request_command(arguments: argparse.Namespace) -> int:
    """Pause, suspend or cancel: through the living controller where there is one, else straight into the journal."""
    from terrace.curriculum.journal import Journal, LeaseHeld, leave_request, read_journal
    from terrace.curriculum.run_directory import require_run
    from terrace.curriculum.state import TERMINAL, fold

    place, kind = arguments.run_dir, arguments.request
    word = kind.removesuffix("_requested")
    if on_kubernetes.is_reference(place):
        return on_kubernetes.wish(place, word)
    run_dir = mirror.open_run(place)
    names = [stage.name for stage in require_run(run_dir).stages]
    state = fold(names, read_journal(run_dir).events)
    if state.phase in TERMINAL:
        raise InputError(f"{place}: the run is {state.phase}; there is nothing to {word}")
    try:
        with Journal(run_dir) as journal:
            journal.append({"event": kind})
        print(f"{place}: {word} noted; no controller works on it now")
    except LeaseHeld:
        leave_request(run_dir, {"event": kind})
        print(f"{place}: {word} asked of its controller; `terrace status {place}` shows when it is done")
    return 0


def logs_command(arguments: argparse.Namespace) -> int:
    from terrace.curriculum.journal import lease_holder
    from terrace.curriculum.run_directory import require_run

    if on_kubernetes.is_reference(arguments.run_dir):
        return on_kubernetes.logs(arguments.run_dir, arguments.stage, arguments.rank, arguments.follow)
    arguments.run_dir = mirror.open_run(arguments.run_dir)
    require_run(arguments.run_dir)
    pattern = f"stages/*-{arguments.stage or '*'}/attempts/*/rank-{arguments.rank:04d}.log"
    logs = sorted(Path(arguments.run_dir).glob(pattern), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise InputError(f"{arguments.run_dir}: no log of {arguments.stage or 'any stage'}, rank {arguments.rank}")
    print(f"# {logs[-1]}", file=sys.stderr)
    with open(logs[-1], encoding="utf-8", errors="replace") as file:
        while True:
            sys.stdout.write(file.read())
            sys.stdout.flush()
            if not arguments.follow or lease_holder(arguments.run_dir) is None:
                return 0
            time.sleep(0.5)
            if mirror.root_of(arguments.run_dir):
                mirror.synchronise(arguments.run_dir, pull_only=True)
