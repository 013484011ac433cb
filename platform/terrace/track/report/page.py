"""The report's page: what was run, when, how the curves went, what it cost against the plan, and what every model comes from.

One file without scripts and without addresses: it can be mailed, printed, or opened from a disk in ten years. Two runs share every
chart (the second one dashed) and stand below each other where a chart cannot hold both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from terrace.page import document, facts
from terrace.track.report.charts import DASHES
from terrace.track.report.curves import Curves, shares
from terrace.track.report.iteration import iteration_part
from terrace.track.report.judgements import judgements_part
from terrace.track.report.numbers import clock, short_number, span
from terrace.track.report.read import RunReport
from terrace.track.report.style import STYLE
from terrace.track.report.suites import suites_part
from terrace.track.report.tables import (
    answers,
    checkpoints,
    events_table,
    examples,
    gates_table,
    held_out_table,
    lineage,
    plan_table,
    stages_table,
    trouble_table,
)
from terrace.track.report.timeline import timeline

SECTIONS = (  # id, heading; a section without content is left out
    ("timeline", "Timeline"),
    ("stages", "Stages"),
    ("loss", "Training"),
    ("held-out", "Held-out samples, before and after"),
    ("suites", "Suites"),
    ("tasks", "Reinforcement learning, per task"),
    ("iteration", "An iteration: who waited for what"),
    ("judgements", "Judgements"),
    ("answers", "In the model's own words"),
    ("throughput", "Throughput"),
    ("data", "Data"),
    ("plan", "Plan against measurement"),
    ("checkpoints", "Checkpoints and lineage"),
    ("events", "Failures, resumes and requests"),
    ("recipe", "Recipe and journal"),
)
_CODE = re.compile(r"`([^`]*)`")


def write_page(runs: Sequence[RunReport], path: Path) -> Path:
    """Writes the report of one run, or of two side by side, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["A", "B"] if len(runs) == 2 else [""]
    curves = Curves(runs, names)
    content = {
        "timeline": _each(runs, names, lambda run, name: _timeline(run, name)),
        "stages": _each(runs, names, lambda run, _: stages_table(run)),
        "loss": _panel(curves.training()),
        "held-out": _panel(curves.held_out()) + _each(runs, names, lambda run, _: held_out_table(run) + gates_table(run)),
        "suites": _each(runs, names, lambda run, _: suites_part(run)),
        "tasks": _panel(curves.tasks()) + _each(runs, names, lambda run, _: examples(run)),
        "iteration": _each(runs, names, lambda run, _: iteration_part(run)),
        "judgements": _each(runs, names, lambda run, _: judgements_part(run)),
        "answers": _each(runs, names, lambda run, _: answers(run)),
        "throughput": _panel(curves.throughput()),
        "data": _each(runs, names, lambda run, _: shares(run)),
        "plan": _each(runs, names, lambda run, _: plan_table(run)),
        "checkpoints": _each(runs, names, lambda run, _: lineage(run) + checkpoints(run)),
        "events": _each(runs, names, lambda run, _: trouble_table(run)),
        "recipe": _each(runs, names, lambda run, _: events_table(run)),
    }
    shown = [(mark, heading) for mark, heading in SECTIONS if content[mark]]
    links = "".join(f'<a href="#{mark}">{escape(heading)}</a>' for mark, heading in shown)
    sections = "".join(f'<section id="{mark}"><h2>{escape(heading)}</h2>{content[mark]}</section>' for mark, heading in shown)
    title = " and ".join(dict.fromkeys(run.recipe.name for run in runs))
    body = f"{_heads(runs, names)}<nav>{links}</nav>{_key(runs)}{sections}{_foot(runs)}"
    path.write_text(document(f"{title}, report", body, STYLE), encoding="utf-8")
    return path


def _heads(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    if len(runs) == 1:
        return _head(runs[0], "", "h1")
    return f'<h1>Two runs side by side</h1><div class="pair">{"".join(_head(run, name, "h2") for run, name in zip(runs, names))}</div>'


def _head(run: RunReport, name: str, level: str) -> str:
    attempts = sum(len(stage.attempts) for stage in run.stages)
    ended = run.ended_at or (run.written_at if run.phase == "running" else run.last_time) or run.written_at
    figures = [
        (f"{sum(stage.phase == 'completed' for stage in run.stages)} / {len(run.stages)}", "stages complete"),
        (f"{sum(stage.steps for stage in run.stages):,}", "optimizer steps"),
        (short_number(sum(stage.tokens for stage in run.stages)), "tokens"),
        (span(sum(stage.seconds for stage in run.stages)), "in optimizer steps"),
        (span(ended - run.started_at) if run.started_at else "–", "from start to end" if run.ended_at else "since the start"),
        (str(attempts), "attempts"),
        (str(sum(attempt.outcome in ("failed", "interrupted") for stage in run.stages for attempt in stage.attempts)), "failures"),
    ]
    description = f'<p class="lead">{escape(run.recipe.description)}</p>' if run.recipe.description else ""
    why = _CODE.sub(r"<code>\1</code>", escape(run.message)) if run.phase != "succeeded" else ""
    message = f'<p class="why">{why}</p>' if why else ""
    label = f'<span class="run-name">{name}</span> ' if name else ""
    return (
        f'<header class="run"><{level}>{label}{escape(run.recipe.name)} '
        f'<span class="phase {run.phase}">{escape(run.phase)}</span></{level}>'
        f"{description}{message}"
        f'<p class="ids"><span>started {clock(run.started_at)} UTC</span><span>recipe <code>{run.recipe_hash[:12]}</code></span>'
        f"<span>data <code>{run.data_mark[:12] or '–'}</code></span><span><code>{escape(str(run.run_dir))}</code></span></p>"
        f"{facts(figures)}</header>"
    )


def _key(runs: Sequence[RunReport]) -> str:
    """How to read the charts, once."""
    lines = [
        '<span><svg class="swatch" viewBox="0 0 34 12"><rect class="band" width="34" height="12"/><line class="line" x1="0" x2="34" y1="6" '
        'y2="6"/></svg>mean, and the range of single steps</span>'
    ]
    if len(runs) == 2:
        lines = [
            f'<span class="run{order}"><svg class="swatch" viewBox="0 0 34 12">'
            f'<line class="line" x1="0" x2="34" y1="6" y2="6"{dash}/></svg>'
            f"run {name}: {escape(run.run_dir.name)}</span>"
            for order, (run, name, dash) in enumerate(zip(runs, "AB", DASHES), start=1)
        ]
    elif any(attempt.first_step for stage in runs[0].stages for attempt in stage.attempts):
        lines.append("<span>↻ went on from a checkpoint</span>")
    if any(row.get("skipped") for run in runs for stage in run.stages for row in stage.rows):
        lines.append("<span>× skipped or not finite</span>")
    lines.append("<span>x axis: steps of each stage; a stage's width grows with the root of its steps</span>")
    return f'<p class="key run1">{"".join(lines)}</p>'


def _timeline(run: RunReport, name: str) -> str:
    drawn = timeline(run, f"bar{name}")
    if not drawn:
        return '<p class="note">No stage has started.</p>'
    signs = (
        "<span>✓ completed</span><span>✗ failed or interrupted (striped)</span><span>‖ preempted (ruled)</span><span>▸ runs</span>"
        "<span>▲ checkpoint</span><span>◆ gate</span><span>→ weights handed over</span><span>wall clock since the start</span>"
    )
    key = "" if name == "A" else f'<p class="key">{signs}</p>'  # once below both
    return f'<div class="panel">{drawn}</div>{key}'


def _each(runs: Sequence[RunReport], names: Sequence[str], show: Callable[[RunReport, str], str]) -> str:
    """Each run's own part, under its name where there are two; '' where none has any."""
    parts = [(run, name, show(run, name)) for run, name in zip(runs, names)]
    if len(runs) == 1:
        return parts[0][2]
    if not any(part for _, _, part in parts):
        return ""
    return "".join(
        f'<h3><span class="run-name">{name}</span> {escape(run.run_dir.name)}</h3>{part or "<p class=note>nothing here</p>"}'
        for run, name, part in parts
    )


def _panel(content: str) -> str:
    return f'<div class="panel charts">{content}</div>' if content else ""


def _foot(runs: Sequence[RunReport]) -> str:
    torn = " The journal's last line was being written and is left out." if any(run.torn for run in runs) else ""
    return f"<footer>Written {clock(max(run.written_at for run in runs))} UTC by <code>terrace report</code>.{torn}</footer>"
