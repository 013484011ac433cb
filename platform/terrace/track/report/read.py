"""What the report shows, read from a run directory and nothing else: recipe, journal, metrics, results, manifests.

Reading never locks and never writes, so a report may be made while the run goes on: a torn last line is left out, a
file that appears later is missing. Anything else that cannot be read is named with its file and line, because a report
that leaves out what it does not understand would be believed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.recipe.schema import Recipe, Stage
from terrace.storage.run_layout import stage_directory
from terrace.track.figures import StageFigures, parameters_of, stage_figures
from terrace.track.report.answers import Answer, read_gallery

Event = Mapping[str, Any]
Row = Mapping[str, Any]
ENDINGS = {
    "stage_completed": "completed",
    "stage_attempt_failed": "failed",
    "stage_attempt_preempted": "preempted",
    "stage_attempt_interrupted": "interrupted",
}


@dataclass(frozen=True)
class Attempt:
    """One try at a stage. `ended` None: it runs, or nobody has written down how it ended. Times are seconds since 1970."""

    number: int
    started: float
    ended: float | None
    outcome: str  # completed, failed, preempted, interrupted, running, or unknown: nobody saw its end
    reason: str
    message: str
    first_step: int  # it went on after this step; 0: from the stage's start


@dataclass(frozen=True)
class Checkpoint:
    step: int
    bytes: int
    attempt: int | None
    strategy: str
    workers: int | None
    recipe_hash: str
    stage_hash: str
    data: Mapping[str, Any]  # the place in the data order; `plan` is its fingerprint


@dataclass(frozen=True)
class StageReport:
    """One stage as far as it has come. `rows` are those of metrics.jsonl; `plan` is the planner's JSON form of the stage."""

    number: int
    name: str
    stage: Stage
    phase: str
    starts_from: str | None
    attempts: list[Attempt]
    gates: list[Event]
    saved: list[tuple[float, int]]  # time and step of each checkpoint, also of those that are deleted by now
    rows: list[Row]
    result: Mapping[str, Any] | None
    checkpoints: list[Checkpoint]
    final_bytes: int | None
    parameters: int | None  # that `final/` holds
    examples: list[Mapping[str, Any]]
    nonfinite: list[Mapping[str, Any]]
    total_steps: int | None
    reruns: int
    plan: Mapping[str, Any] | None = None
    judgements: Mapping[str, Any] | None = None  # of a grpo stage: the state of its `track.calibration.Calibration`, and `pictures`
    trace: Mapping[str, Any] | None = None  # of a grpo stage: who waited for what in its last iteration

    @cached_property
    def figures(self) -> StageFigures:
        """Without start-up, evaluation and what was done twice."""
        return stage_figures(self.rows)

    @property
    def steps(self) -> int:
        return self.figures.steps

    @property
    def seconds(self) -> float:
        return self.figures.seconds

    @property
    def tokens(self) -> int:
        return self.figures.tokens


@dataclass(frozen=True)
class RunReport:
    run_dir: Path
    recipe: Recipe
    recipe_text: str
    recipe_hash: str
    data_mark: str  # fingerprint of the data and tokenizer sections and what they prepared; '' before that
    phase: str
    message: str
    started_at: float | None
    ended_at: float | None
    written_at: float
    events: list[Event]
    stages: list[StageReport]
    answers: list[Answer]
    plan: Mapping[str, Any] | None = None  # the planner's JSON form of the recipe
    plan_note: str = ""
    torn: bool = False

    @property
    def last_time(self) -> float | None:
        """The newest time in the journal."""
        return max((event["time"] for event in self.events if "time" in event), default=None)


def read_stages(
    run_dir: Path, recipe: Recipe, events: Sequence[Event], phases: Mapping[str, str], plan: Mapping[str, Any] | None
) -> list[StageReport]:
    """Every stage of the recipe, in order. Raises InputError naming a file that is damaged."""
    plans = {stage["name"]: stage for stage in plan["stages"]} if plan else {}
    return [
        _read_stage(run_dir, index, stage, _events_of(stage.name, events), phases.get(stage.name, "pending"), plans.get(stage.name))
        for index, stage in enumerate(recipe.stages)
    ]


def without_controller(stages: Sequence[StageReport]) -> list[StageReport]:
    """The stages of a run that nobody works on: what the journal still calls running has stopped, nobody knows how."""
    return [
        replace(
            stage,
            phase="stopped" if stage.phase == "running" else stage.phase,
            attempts=[replace(attempt, outcome="unknown") if attempt.ended is None else attempt for attempt in stage.attempts],
        )
        for stage in stages
    ]


def read_answers(run_dir: Path) -> list[Answer]:
    """The model's answers to held-out questions that the demo left in `gallery.html`; [] without one."""
    path = run_dir / "gallery.html"
    return read_gallery(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []


def read_data_mark(run_dir: Path) -> str:
    path = run_dir / "data" / "prepared.json"
    return str(_object(path).get("mark", "")) if path.is_file() else ""


# ---------------------------------------------------------------- one stage


def _events_of(stage: str, events: Sequence[Event]) -> list[Event]:
    """The stage's events since it was last run from its start; earlier ones belong to a folder that was moved aside."""
    own = [event for event in events if event.get("stage") == stage]
    cleared = [place for place, event in enumerate(own) if event.get("event") == "stage_cleared"]
    return own[cleared[-1] + 1 :] if cleared else own


def _read_stage(run_dir: Path, index: int, stage: Stage, events: list[Event], phase: str, plan: Mapping[str, Any] | None) -> StageReport:
    folder = stage_directory(run_dir, index, stage.name)
    attempts = read_attempts(events)
    result_file, plan_file = folder / "result.json", folder / "plan.json"
    result = _object(result_file) if result_file.is_file() else None
    planned = _object(plan_file).get("total_steps") if plan_file.is_file() else None
    final = folder / "final"
    return StageReport(
        number=index + 1,
        name=stage.name,
        stage=stage,
        phase=phase,
        starts_from=next((event.get("from") for event in reversed(events) if event.get("event") == "handed_over"), None),
        attempts=attempts,
        gates=[event for event in events if event.get("event") in ("gate_passed", "gate_missed")],
        saved=[(event["time"], event["step"]) for event in events if event.get("event") == "checkpoint_saved"],
        rows=read_rows(folder / "metrics.jsonl", required=("step",)),
        result=result,
        checkpoints=read_checkpoints(folder / "checkpoints"),
        final_bytes=sum(path.stat().st_size for path in final.iterdir() if path.is_file()) if final.is_dir() else None,
        parameters=parameters_of(final),
        examples=read_rows(folder / "examples.jsonl"),
        judgements=_object(folder / "calibration.json") if (folder / "calibration.json").is_file() else None,
        trace=_object(folder / "iteration-trace.json") if (folder / "iteration-trace.json").is_file() else None,
        nonfinite=read_rows(folder / "nonfinite.jsonl"),
        total_steps=(result or {}).get("steps") or planned or (plan or {}).get("steps"),
        reruns=len(list(folder.parent.glob(f"{folder.name}.rerun-*"))),
        plan=plan,
    )


def read_attempts(events: Sequence[Event]) -> list[Attempt]:
    """The attempts of one stage from its events.

    An attempt goes on from the newest checkpoint seen before it was seen running: the one before it may have saved
    that as its last act, after its controller was gone.
    """
    attempts: list[Attempt] = []
    step = 0
    for event in events:
        kind = event.get("event")
        if kind == "stage_attempt_started":
            attempts.append(Attempt(event["attempt"], event["time"], None, "running", "", "", step))
        elif kind == "checkpoint_saved":
            step = event["step"]
        elif attempts and event.get("attempt") == attempts[-1].number:
            last = attempts[-1]
            if kind == "stage_attempt_launched" and last.number > 1:
                attempts[-1] = replace(last, first_step=step)
            elif kind in ENDINGS:
                attempts[-1] = replace(
                    last,
                    ended=event["time"],
                    outcome=ENDINGS[kind],
                    reason=event.get("reason", ""),
                    message=event.get("message", ""),
                )
    return attempts


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints (those with a manifest), oldest first. One that is deleted meanwhile is left out."""
    found = []
    for path in sorted(folder.glob("step-*")):
        manifest = path / "manifest.json"
        if not path.name[5:].isdigit() or not manifest.is_file():
            continue
        try:
            content, state = _object(manifest), _object(path / "state.json")
        except FileNotFoundError:
            continue  # the run keeps its newest few: this one went while we read
        saved_by = state.get("saved_by") or {}
        files = content.get("files") or {}
        found.append(
            Checkpoint(
                step=int(path.name[5:]),
                bytes=sum(int(file.get("bytes", 0)) for file in files.values()),
                attempt=content.get("attempt"),
                strategy=str(saved_by.get("strategy", "")),
                workers=saved_by.get("world_size"),
                recipe_hash=str(state.get("recipe_hash", "")),
                stage_hash=str(state.get("stage_hash", "")),
                data=state.get("data") or {},
            )
        )
    return found


# ---------------------------------------------------------------- files


def read_rows(path: Path, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; [] without one. A last line without its newline is still being written."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        if line:
            row = _checked(path, number, lambda line=line: json.loads(line))
            if missing := [key for key in required if key not in row]:
                raise InputError(f"{path}, line {number}: no {missing[0]!r} in it; cut the file before this line or restore it")
            rows.append(row)
    return rows


def _object(path: Path) -> dict[str, Any]:
    return _checked(path, None, lambda: json.loads(path.read_bytes()))


def _checked(path: Path, number: int | None, read: Callable[[], Any]) -> dict[str, Any]:
    where = f"{path}, line {number}" if number else str(path)
    try:
        value = read()
    except ValueError as error:
        raise InputError(f"{where}: not a JSON object ({error}); restore the file, or resume the run, which writes it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object; restore the file, or resume the run, which writes it again")
    return value
