"""`terrace track RUN --uri URI`: bring a tracking server to what a run directory holds, running or finished, as often as wanted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from terrace.curriculum.command import RUN_HELP, run_directory
from terrace.curriculum.journal import last_seen, lease_holder, read_journal
from terrace.curriculum.run_directory import require_run
from terrace.curriculum.state import RunState, fold
from terrace.curriculum.tracked import TrackedRun
from terrace.errors import InputError, TerraceError
from terrace.recipe.credentials import credentials_problem
from terrace.recipe.schema import Recipe
from terrace.storage import mirror
from terrace.track.also import ALSO
from terrace.track.tracking import open_tracking

RUN_STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
STAGE_STATUS = {"completed": "FINISHED", "failed": "FAILED"}


def register(subparsers: argparse._SubParsersAction) -> None:
    track = subparsers.add_parser(
        "track",
        help="fill an MLflow server, or another tracker, from a run directory",
        description="Send what the server does not have: runs, steps, evaluations, artifacts. Nothing is written twice.",
    )
    track.add_argument("run_dir", type=run_directory, help=RUN_HELP.rpartition(", or")[0])
    track.add_argument("--uri", help="MLflow tracking URI; default: the recipe's, or sqlite in the run directory")
    track.add_argument("--experiment", help="MLflow experiment; default: the recipe's")
    track.add_argument(
        "--also", action="append", choices=sorted(ALSO), help="also this tracker, in the run directory (repeatable); default: the recipe's"
    )
    track.set_defaults(main=track_command)


def track_command(arguments: argparse.Namespace) -> int:
    if problem := credentials_problem(arguments.uri or ""):
        raise InputError(f"--uri {problem}")
    run_dir = mirror.open_run(arguments.run_dir)
    recipe = require_run(run_dir)
    uri, place = arguments.uri or recipe.tracking.uri, mirror.place_of(run_dir)
    if uri == recipe.tracking.uri and (holder := lease_holder(run_dir)):
        where = uri or "its own mlflow.db"
        raise InputError(f"{place}: process {holder['pid']} on {holder['host']} runs it and sends its steps to {where} already")
    events = read_journal(run_dir).events
    state = fold([stage.name for stage in recipe.stages], events)
    if state.started_at is None:
        raise InputError(f"{place} has not started yet: there is nothing to track")
    also = arguments.also or recipe.tracking.also
    send_run(recipe, run_dir, state, uri, arguments.experiment or recipe.tracking.experiment, also, last_seen(events))
    print(f"{place} is at {uri or f'sqlite:///{run_dir}/mlflow.db'}")
    for kind in dict.fromkeys(also):
        print(f"{place} is in {run_dir / kind}")
    return 0


def send_run(
    recipe: Recipe, run_dir: Path, state: RunState, uri: str | None, experiment: str, also: Sequence[str], seen_at: float | None
) -> None:
    """All that the run directory has, to MLflow and to each of `also`. Raises TerraceError where the server is not reached, or something
    was left out."""
    said: list[str] = []
    tracking = open_tracking(run_dir, uri, experiment, said.append, also)
    run = TrackedRun(tracking, recipe, run_dir, state)
    run.start(lambda run_id: None)
    for stage in state.stages:
        if stage.attempt and not stage.must_clear:  # of a rerun that has not begun, the folder still holds what was before
            run.start_stage(stage, lambda run_id: None)
            run.end_stage(stage, STAGE_STATUS.get(stage.phase, "SCHEDULED"), seen_at)
    run.end(RUN_STATUS.get(state.phase, "SCHEDULED"), seen_at)
    sent = tracking.flush(float("inf"))
    if not sent:
        tracking.close()
        raise TerraceError(f"the tracking server {uri} {tracking.why}; the same command sends the rest when it is back")
    tracking.close()
    print(*said, sep="\n", end="\n" * bool(said), file=sys.stderr)
    if tracking.failed:
        raise TerraceError(f"{tracking.failed} calls were left out, as said above; the rest is at {uri}")
