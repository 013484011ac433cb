"""Where a run stands, for people (`terrace status DIR`) and for programs (`--json`): read-only, safe at any time.

The JSON form is a contract: `phase`, `reason`, `message`, `request`, `samples` and `refused` by source, `controller`, and per stage
`name`, `phase`, `attempt`, `step`, `total_steps`, `loss`, `evaluation`, `checkpoints`, `final`, `failures`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from terrace.cluster.attempt_files import read_json
from terrace.cluster.attempt_outcome import checkpoint_steps
from terrace.curriculum.journal import last_seen, lease_holder, read_journal
from terrace.curriculum.refused import refused_sentences
from terrace.curriculum.run_directory import require_run
from terrace.curriculum.state import RunState, StageState, fold
from terrace.curriculum.watch import planned_steps
from terrace.recipe.schema import Recipe
from terrace.storage.mirror import place_of, uri_of
from terrace.storage.run_layout import stage_directory
from terrace.track.figures import evaluation_mean, last_measured, measure_of
from terrace.track.follow import last_row
from terrace.track.progress import duration

_STYLES = {
    "succeeded": "green",
    "completed": "green",
    "running": "cyan",
    "failed": "red",
    "cancelled": "red",
    "paused": "yellow",
    "suspended": "yellow",
    "waiting": "yellow",
    "stopped": "yellow",
}


def run_status(run_dir: Path) -> dict[str, Any]:
    """Everything `terrace status` shows, as plain values. Raises InputError where there is no run."""
    run_dir = Path(run_dir).absolute()
    recipe = require_run(run_dir)
    content = read_journal(run_dir)
    state = fold([stage.name for stage in recipe.stages], content.events)
    holder = lease_holder(run_dir)
    phase = state.phase
    if phase == "running" and holder is None:
        phase = "stopped"  # nobody works on it: it goes on when somebody starts it again
    return {
        "name": recipe.name,
        "run_dir": place_of(run_dir),
        "phase": phase,
        "reason": state.reason,
        "message": state.message or _why(state, holder),
        "request": state.request,
        "samples": state.samples,
        "refused": state.refused,
        "controller": {key: holder[key] for key in ("host", "pid", "acquired")} if holder else None,
        "started_at": state.started_at,
        "ended_at": state.ended_at,
        "seen_at": _seen_at(content.events, phase),
        "torn_journal_characters": len(content.torn),
        "mlflow_run": state.tracking_run,
        "stages": [_stage_status(recipe, stage, run_dir, phase) for stage in state.stages],
    }


def _seen_at(events: list[dict[str, Any]], phase: str) -> float | None:
    """When somebody last worked on a run that rests; None while it runs. Its clocks stand still there."""
    if phase == "running":
        return None
    return last_seen(events)


def _stage_phase(stage: StageState, phase: str) -> str:
    """A stage that waits for another attempt which will not come is what its run is."""
    if stage.phase in ("waiting", "running") and phase in ("failed", "cancelled", "stopped"):
        return phase
    return stage.phase


def _why(state: RunState, holder: dict[str, Any] | None) -> str:
    """Why a run that is not at its end does not move."""
    if state.phase == "new":
        return "not started yet"
    if state.phase == "running" and holder is None:
        return "no controller works on this run; the same `terrace run` command, or `terrace resume`, continues it"
    stage = state.current
    if state.request:
        return f"{state.request} was requested" + (f"; stage {stage.name} is finished first" if stage and state.request == "pause" else "")
    if stage and stage.phase == "waiting" and stage.retry_at:
        wait = max(0.0, stage.retry_at - time.time())
        return f"stage {stage.name} is tried again in {duration(wait)}: {stage.message or stage.reason}"
    return ""


def _stage_status(recipe: Recipe, stage: StageState, run_dir: Path, phase: str) -> dict[str, Any]:
    folder = stage_directory(run_dir, stage.index, stage.name)
    row = last_row(folder / "metrics.jsonl") if stage.attempt else None
    judged = (last_row(folder / "metrics.jsonl", with_key="reward") if recipe.stages[stage.index].objective == "grpo" else None) or row
    written = read_json(folder / "result.json") if stage.attempt and not stage.must_clear else None
    result = {**(written or {}), **(stage.result or {})}
    checkpoints = [f"step-{step:06d}" for step in checkpoint_steps(folder)]
    final, uri = folder / "final", uri_of(folder / "final")
    stored = uri if uri and stage.phase == "completed" else None
    plan = read_json(folder / "plan.json") or {}
    total = result.get("steps") or plan.get("total_steps") or planned_steps(recipe.stages[stage.index])
    return {
        "name": stage.name,
        "phase": _stage_phase(stage, phase),
        "attempt": stage.attempt,
        "step": result.get("steps") or (row["step"] if row else 0),
        "total_steps": total,
        "loss": row["loss"] if row else None,
        "measure": measure_of(judged) if judged else None,
        "last": last_measured(judged) if judged else None,
        "tokens_per_second": row.get("tokens_per_second") if row else None,
        "evaluation": result.get("evaluation") or {},
        "gates": [stage.gates[number] for number in sorted(stage.gates)],
        "checkpoints": checkpoints,
        "final": stored or (str(final) if final.is_dir() else None),
        "failures": {
            "program": stage.program_failures,
            "infrastructure": stage.infrastructure_failures,
            "preemptions": stage.preemptions,
            "interruptions": stage.interruptions,
        },
        "reason": stage.reason,
        "message": stage.message,
        "starts_from": stage.starts_from,
        "started_at": stage.started_at,
        "completed_at": stage.completed_at,
        "retry_at": stage.retry_at,
    }


def print_status(status: dict[str, Any]) -> None:
    """A table for a person, on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)  # nobody's window: a log file must not cut the columns
    style = _STYLES.get(status["phase"], "white")
    done = sum(stage["phase"] == "completed" for stage in status["stages"])
    console.print(
        f"[bold]{escape(status['name'])}[/]  [{style}]{status['phase']}[/]  {done}/{len(status['stages'])} stages  {_times(status)}",
        soft_wrap=True,
    )
    if status["message"]:
        console.print(escape(status["message"]), style=style, soft_wrap=True)
    for sentence in refused_sentences(status["refused"], status["samples"]):
        console.print(escape(sentence), style="yellow", soft_wrap=True)
    columns = (
        ("stage", "left"), ("phase", "left"), ("step", "right"), ("loss", "right"), ("before", "right"), ("after", "right"),
        ("checkpoint", "left"), ("attempts", "right"), ("time", "right"),
    )  # fmt: skip
    rows = []
    for number, stage in enumerate(status["stages"], start=1):
        before, after = (evaluation_mean(stage["evaluation"].get(when)) for when in ("before", "after"))
        rows.append((
            f"{number} {escape(stage['name'])}",
            f"[{_STYLES.get(stage['phase'], 'dim')}]{stage['phase']}[/]",
            f"{stage['step']}/{stage['total_steps'] or '?'}",
            _number(stage["last"]) + (f" {stage['measure']}" if stage["measure"] == "reward" else ""),
            _number(before),
            _number(after),
            "final" if stage["final"] else (stage["checkpoints"][-1] if stage["checkpoints"] else "-"),
            str(stage["attempt"] or "-"),
            _stage_time(stage, status["seen_at"]),
        ))  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if Console(width=10_000).measure(table).maximum <= console.width:
        console.print(table)
    else:  # a narrow window: every figure in words, instead of columns that are cut
        for row in rows:
            named = [f"{name} {value}" for (name, _), value in zip(columns[2:], row[2:], strict=True) if value != "-"]
            console.print(f"[bold]{row[0]}[/]  {row[1]}\n  {', '.join(named)}")
    for stage in status["stages"]:
        for gate in stage["gates"]:
            if not gate["passed"]:
                console.print(
                    f"stage {stage['name']} missed its gate on {gate['metric']} ({_number(gate['value'])})",
                    style="yellow",
                )
        if stage["message"] and stage["phase"] == "waiting":
            console.print(
                escape(f"stage {stage['name']}, attempt {stage['attempt']}: {stage['reason']}: {stage['message']}"),
                style="yellow",
                soft_wrap=True,
            )
    if status["controller"]:
        console.print(f"controller: process {status['controller']['pid']} on {status['controller']['host']}", style="dim")
    console.print(f"run directory: {escape(status['run_dir'])}", style="dim", soft_wrap=True)


def _times(status: dict[str, Any]) -> str:
    if status["started_at"] is None:
        return ""
    end = status["ended_at"] or status["seen_at"] or time.time()
    started = time.strftime("%Y-%m-%d %H:%M", time.gmtime(status["started_at"]))
    return f"started {started} UTC, {duration(end - status['started_at'])}"


def _stage_time(stage: dict[str, Any], seen_at: float | None) -> str:
    if stage["started_at"] is None:
        return "-"
    return duration(max(0.0, (stage["completed_at"] or seen_at or time.time()) - stage["started_at"]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
