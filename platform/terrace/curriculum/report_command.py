"""`terrace report RUN_DIR [RUN_B] [--out FILE]`: one HTML file about one run, or about two side by side."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terrace.curriculum.command import run_directory
from terrace.errors import InputError
from terrace.storage import mirror

if TYPE_CHECKING:
    from terrace.recipe.schema import Recipe
    from terrace.track.report.read import RunReport


def register(subparsers: argparse._SubParsersAction) -> None:
    report = subparsers.add_parser(
        "report",
        help="write a run's report",
        description="Write one self-contained HTML file about a run, during it or afterwards: timeline, curves, held-out losses, "
        "plan against measurement, checkpoints and their lineage, every failure and resume.",
    )
    report.add_argument("run_dir", type=run_directory, help="directory of the run, or s3://BUCKET/PREFIX")
    report.add_argument("other", type=run_directory, nargs="?", metavar="RUN_B", help="a second run, shown beside the first")
    report.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: RUN_DIR/report.html)")
    report.set_defaults(main=report_command)


def report_command(arguments: argparse.Namespace) -> int:
    from terrace.track.report.page import write_page

    run_dirs = [mirror.open_run(place) for place in (arguments.run_dir, arguments.other) if place]
    runs = [collect_run(run_dir) for run_dir in run_dirs]
    out = arguments.out or (run_dirs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a file, for example {out / 'report.html'}")
    write_page(runs, out)
    mirror.flush(out.parent)  # of a run on S3: the report lies beside it
    print(f"{out}  ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def collect_run(run_dir: Path, now: float | None = None) -> RunReport:
    """Everything the report shows of one run. Raises InputError where there is no run, or one of its files is damaged."""
    from terrace.curriculum.journal import JournalError, read_journal
    from terrace.curriculum.run_directory import require_run
    from terrace.curriculum.state import fold
    from terrace.curriculum.status import run_status
    from terrace.recipe.identity import recipe_hash
    from terrace.track.report.read import RunReport, read_answers, read_data_mark, read_stages, without_controller

    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is no folder; name the --run-dir of a run")
    recipe = require_run(run_dir)
    try:
        content = read_journal(run_dir)
    except JournalError as error:
        raise InputError(str(error)) from error
    if not content.events:
        raise InputError(f"{run_dir} holds a recipe but no journal: nothing has run in it yet; `terrace plan` shows what it would take")
    for number, event in enumerate(content.events, start=1):
        needed = ("time", "event", *(("attempt",) if str(event.get("event")).startswith("stage_attempt_") else ()))
        if missing := [key for key in needed if key not in event]:
            raise InputError(f"{run_dir / 'journal.jsonl'}, line {number}: no {missing[0]!r} in it; restore the file")
    state = fold([stage.name for stage in recipe.stages], content.events)
    data_mark = read_data_mark(run_dir)
    plan, note = plan_of(recipe, run_dir)
    stages = read_stages(run_dir, recipe, content.events, {stage.name: stage.phase for stage in state.stages}, plan)
    status = run_status(run_dir)  # after the files have been checked one by one, with a message for each
    return RunReport(
        run_dir=run_dir.absolute(),
        recipe=recipe,
        recipe_text=(run_dir / "recipe.yaml").read_text(encoding="utf-8"),
        recipe_hash=recipe_hash(recipe),
        data_mark=data_mark,
        phase=status["phase"],
        message=status["message"],
        started_at=state.started_at,
        ended_at=state.ended_at,
        written_at=time.time() if now is None else now,
        events=content.events,
        stages=stages if status["controller"] else without_controller(stages),
        answers=read_answers(run_dir),
        plan=plan,
        plan_note=note,
        torn=bool(content.torn),
    )


def plan_of(recipe: Recipe, run_dir: Path) -> tuple[Mapping[str, Any] | None, str]:
    """The planner's JSON form of the recipe and what it rests on: the run's index where it is there, else assumptions.

    None with the reason where the recipe cannot be planned: the report then shows what was measured alone.
    """
    from terrace.planner.data_facts import load_facts
    from terrace.planner.plan import make_plan
    from terrace.planner.render import plan_values

    facts, why = None, ""
    try:
        facts = load_facts(recipe, run_dir / "data")
    except (InputError, OSError) as error:
        why = f", because the run's index cannot be read ({error})"
    try:
        plan = plan_values(make_plan(recipe, facts=facts))
    except InputError as error:
        return None, f"this recipe cannot be planned: {error}"
    exact = all(stage["exact"] for stage in plan["stages"])
    return plan, "samples and tokens from the run's own index" if exact else f"samples and tokens assumed for some stages{why}"
