"""One attempt of one stage, as a job or a pod runs it: a controller elsewhere counts attempts and decides what comes next.

    terrace run RECIPE --run-dir DIR --stage NAME --attempt N [--rerun K]

It prepares data that is not prepared, resumes from the stage's newest checkpoint, writes the stage's files and leaves with 0, 143
(told to stop, checkpoint saved), 2 (wrong input) or 1. SIGTERM, a stop request in the stage's directory, the notice of a pod that
must go and the operator's directive all lead to the same: a checkpoint and 143.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path

from terrace.cluster import attempt_files as files
from terrace.cluster import stop_notice
from terrace.cluster.attempt import AttemptObservation, LaunchRequest
from terrace.curriculum.run import PreparesData, listen_for_signals, move_aside, prepare_run_data
from terrace.errors import InputError, TerraceError
from terrace.recipe.schema import Recipe
from terrace.storage import mirror
from terrace.storage.run_layout import stage_directory
from terrace.track.follow import MetricsFollower
from terrace.track.progress import Display

LOGGER = logging.getLogger(__name__)
POLL_SECONDS = 0.5


def run_single_attempt(
    recipe: Recipe,
    run_dir: Path,
    stage: str,
    attempt: int,
    rerun: int = 0,
    prepare: PreparesData | None = None,
    launcher: object = None,
) -> int:
    """Run the attempt to its end; the process's exit status. Raises Fenced where a newer attempt has the stage."""
    from terrace.cluster.local import LocalLauncher
    from terrace.curriculum.attempt_worker import run_in_worker

    names = [item.name for item in recipe.stages]
    if stage not in names:
        raise InputError(f"there is no stage {stage}; the recipe's stages are {', '.join(names)}")
    run_dir, index = Path(run_dir).absolute(), names.index(stage)
    folder = stage_directory(run_dir, index, stage)
    if rerun:
        move_aside(folder, rerun)
    files.claim_attempt(folder, attempt)
    stopping = threading.Event()
    launcher = launcher or LocalLauncher(recipe, run_in_worker)
    channel = _report_to_operator(stage, attempt, folder, stopping)
    ended, message = 1, ""
    in_pod = "TERRACE_STOP_FILE" in os.environ
    if in_pod:
        stop_notice.begin()
    try:
        with Display() as display, listen_for_signals(stopping), mirror.following(run_dir, lost=lambda _: stopping.set()):
            (prepare or prepare_run_data)(recipe, run_dir, display)
            launcher.attach(run_dir)
            launcher.launch(LaunchRequest(index, stage, attempt, run_dir))
            grace = recipe.stages[index].failure.preemption_grace_seconds
            seen = _follow(launcher, index, len(names), stage, attempt, folder, stopping, display, grace)
        ended, message = exit_status(seen), f"{seen.reason}: {seen.message}".strip(": ")
        if ended:
            print(f"terrace: stage {stage}, attempt {attempt}: {seen.status}: {message}", file=sys.stderr)
    except TerraceError as error:
        ended, message = error.exit_status, str(error)
        raise
    finally:
        launcher.close()
        if in_pod:
            stop_notice.answer()
        if channel:
            channel.finish(ended, message)
    return ended


def exit_status(seen: AttemptObservation) -> int:
    if seen.status == "succeeded":
        return 0
    if seen.status in ("preempted", "interrupted"):
        return 143
    return 2 if seen.failure == "input" else 1


def _follow(
    launcher: object,
    index: int,
    count: int,
    stage: str,
    attempt: int,
    folder: Path,
    stopping: threading.Event,
    display: Display,
    grace: float,
) -> AttemptObservation:
    """Show the attempt's steps until it is over; pass a wish to stop on, and end it by force when its grace has passed."""
    follower, deadline = MetricsFollower(folder / "metrics.jsonl"), None
    display.stage(index + 1, count, stage, None)
    while True:
        seen = launcher.observe(index, stage, attempt)
        for row in follower.rows():
            if plan := files.read_json(folder / "plan.json"):
                display.total(plan["total_steps"])
            display.step(row)
        if not seen.live and seen.status not in ("running", "starting"):
            return seen
        notice = stop_notice.requested() if "TERRACE_STOP_FILE" in os.environ else None
        asked = notice or files.stop_requested(folder, attempt)
        if deadline is None and (stopping.is_set() or asked):
            deadline = time.monotonic() + grace
            display.message(f"stage {stage}: saving a checkpoint to stop")
            launcher.stop(index, stage, attempt, asked or "told to stop", force=False)
        if deadline is not None and time.monotonic() > deadline:
            launcher.stop(index, stage, attempt, f"no checkpoint within {grace:g} s", force=True)
        time.sleep(POLL_SECONDS)


def _report_to_operator(stage: str, attempt: int, folder: Path, stopping: threading.Event):
    """The channel to the Kubernetes operator, where this is one of its pods."""
    if not os.environ.get("TERRACE_PROGRESS"):
        return None
    from terrace.cluster.progress_channel import Follower, channel_from_environment

    def stop(reason: str) -> None:
        LOGGER.warning("the operator asks to stop: %s", reason)
        stopping.set()

    follower = Follower(channel_from_environment(stage, attempt), str(folder), stop, stop)
    follower.start()
    return follower
