"""The curriculum as a timeline: a row per stage, a bar per attempt, checkpoints, gates, hand-overs, and what people asked for.

Time is wall clock. A gap in which nothing ran (a paused week) is cut short and says how long it was, so that the work around it
stays readable. How an attempt ended is told by the bar's filling and a sign, not by its colour alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

from terrace.track.report.numbers import clock, short_number, span
from terrace.track.report.read import Attempt, RunReport, StageReport

WIDTH, LEFT, RIGHT, ROW, TOP, BOTTOM = 1090, 190, 112, 46, 30, 26
GAP_SHARE = 0.12  # a longer idle gap than this share of the time that something ran is cut to GAP_PIXELS
GAP_PIXELS = 34
SIGNS = {"completed": "✓", "failed": "✗", "preempted": "‖", "interrupted": "✗", "running": "▸", "unknown": "?"}
RUN_EVENTS = {
    "paused": "paused",
    "suspended": "suspended",
    "cancelled": "cancelled",
    "run_failed": "failed",
    "resume_requested": "resumed",
    "rerun_requested": "run again",
    "recipe_changed": "recipe changed",
}


def timeline(run: RunReport, name: str) -> str:
    """An SVG. `name` makes the ids of its patterns unique on the page. '' while no attempt has started."""
    spans = _busy(run)
    if not spans:
        return ""
    scale = _Scale(spans)
    height = TOP + ROW * len(run.stages) + BOTTOM
    asked = _run_events(run, scale, height)
    above = 0 if asked else TOP - 12  # no words above the bars: no room for them
    parts = [_patterns(name), *_axis(scale, height), *asked]
    places = {stage.name: number for number, stage in enumerate(run.stages)}
    for number, stage in enumerate(run.stages):
        parts += _row(run, stage, TOP + ROW * number, scale, name)
    for number, stage in enumerate(run.stages):
        parts += _hand_over(stage, number, places, run, scale)
    summary = f"{run.recipe.name}: {len(run.stages)} stages from {clock(scale.first)} UTC, {span(scale.last - scale.first)}"
    frame = f'viewBox="0 {above} {WIDTH} {height - above}" role="img" aria-label="{escape(summary)}"'
    return f'<svg class="timeline" {frame}>{"".join(parts)}</svg>'


def until(run: RunReport, attempt: Attempt) -> float:
    """When the attempt ended: what the journal says, now while it runs, else the last time that anything was written."""
    if attempt.ended is not None:
        return attempt.ended
    return max(attempt.started, run.written_at if run.phase == "running" else run.last_time or attempt.started)


def _busy(run: RunReport) -> list[tuple[float, float]]:
    """Time spans in which something ran, merged and in order; the first one starts with the run."""
    spans = sorted((attempt.started, until(run, attempt)) for stage in run.stages for attempt in stage.attempts)
    if spans and run.started_at is not None:
        spans.insert(0, (min(run.started_at, spans[0][0]), spans[0][0]))
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1] + 1.0:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


class _Scale:
    """Pixels of wall-clock seconds, with long idle gaps cut."""

    def __init__(self, spans: Sequence[tuple[float, float]]):
        self.first, self.last = spans[0][0], max(spans[-1][1], spans[0][0] + 1.0)
        busy = max(1.0, sum(end - start for start, end in spans))
        gaps = [(before[1], after[0]) for before, after in itertools.pairwise(spans)]
        self.cuts = [(start, end) for start, end in gaps if end - start > GAP_SHARE * busy]
        whole = self.last - self.first - sum(end - start for start, end in self.cuts)
        self.per_second = (WIDTH - LEFT - RIGHT - GAP_PIXELS * len(self.cuts)) / max(1.0, whole)

    def x(self, moment: float) -> float:
        moment = min(max(moment, self.first), self.last)
        x = LEFT + (moment - self.first) * self.per_second
        for start, end in self.cuts:
            inside = min(moment, end) - start
            if inside > 0:
                x += GAP_PIXELS * inside / (end - start) - inside * self.per_second
        return x


def _patterns(name: str) -> str:
    stripes = (
        f'<pattern id="{name}-{{}}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate({{}})">'
        '<rect class="back" width="6" height="6"/><line class="{}" x1="0" x2="0" y1="0" y2="6" stroke-width="5"/></pattern>'
    )
    return f"<defs>{stripes.format('failed', 45, 'failed')}{stripes.format('stopped', 0, 'stopped')}</defs>"


def _axis(scale: _Scale, height: int) -> list[str]:
    parts = []
    seconds = (scale.last - scale.first) - sum(end - start for start, end in scale.cuts)
    sizes = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 432000, 864000)
    step = next((size for size in sizes if seconds / size <= 9), 2592000)
    bottom = height - BOTTOM
    starts = [scale.first, *(end for _, end in scale.cuts)]
    ends = [*(start for start, _ in scale.cuts), scale.last]
    for piece, (start, end) in enumerate(zip(starts, ends)):  # behind a cut, time counts from its end
        for number in range(bool(piece), int((end - start) / step) + 1):
            x = scale.x(start + number * step)
            label = ("+" if piece else "") + (span(number * step) if number else "0")
            parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{bottom}"/>')
            if not any(-30 < scale.x(cut) - x < 30 for cut, _ in scale.cuts):
                parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    for start, end in scale.cuts:
        left, right = scale.x(start), scale.x(end)
        parts.append(f'<rect class="cut" x="{left:.1f}" y="{TOP - 6}" width="{right - left:.1f}" height="{bottom - TOP + 6}"/>')
        parts.append(f'<text x="{(left + right) / 2:.1f}" y="{bottom + 16}" text-anchor="middle">…{span(end - start)}</text>')
    return parts


def _run_events(run: RunReport, scale: _Scale, height: int) -> list[str]:
    parts, last = [], -1e9
    for event in run.events:
        word = RUN_EVENTS.get(event.get("event", ""))
        if event.get("event") == "controller_started":
            word = "started again"
        if word is None or "time" not in event:
            continue
        x = scale.x(event["time"])
        parts.append(f'<line class="asked" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height - BOTTOM}"/>')
        if x - last > 6.4 * len(word):  # names that would lie on each other are in the table below
            anchor = "end" if x > WIDTH - RIGHT - 60 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{TOP - 13}" text-anchor="{anchor}">{escape(word)}</text>')
            last = x
    return parts


def _row(run: RunReport, stage: StageReport, y: float, scale: _Scale, name: str) -> list[str]:
    label = stage.name if len(stage.name) <= 23 else stage.name[:22] + "…"
    trained = " ".join(part for part, training in stage.stage.train if training is not None)
    parts = [
        f'<line class="rule" x1="0" x2="{WIDTH}" y1="{y + ROW - 0.5}" y2="{y + ROW - 0.5}"/>',
        f'<text class="name" x="0" y="{y + 20}">{stage.number} {escape(label)}</text>',
        f'<text x="0" y="{y + 35}">{escape(trained)}</text>',
    ]
    for attempt in stage.attempts:
        start, end = scale.x(attempt.started), scale.x(until(run, attempt))
        width = max(3.0, end - start)
        pattern = {"failed": "failed", "interrupted": "failed", "preempted": "stopped", "unknown": "stopped"}.get(attempt.outcome)
        style = f' style="fill:url(#{name}-{pattern})"' if pattern else ""
        told = f"attempt {attempt.number}: {attempt.outcome} after {span(until(run, attempt) - attempt.started)}. {attempt.message}"
        parts.append(
            f'<rect class="bar {attempt.outcome}" x="{start:.1f}" y="{y + 9}" width="{width:.1f}" height="17" rx="3"{style}>'
            f"<title>{escape(told)}</title></rect>"
        )
        text = f"{attempt.number} {SIGNS[attempt.outcome]}" if len(stage.attempts) > 1 else SIGNS[attempt.outcome]
        if width > 9 * len(text):
            plain = " on" if attempt.outcome in ("completed", "running") else " over"
            parts.append(f'<text class="sign{plain}" x="{start + width / 2:.1f}" y="{y + 22}" text-anchor="middle">{text}</text>')
    for moment, step in stage.saved:
        x = scale.x(moment)
        parts.append(
            f'<path class="saved" d="M{x:.1f} {y + 29} l4 7 h-8 z"><title>checkpoint at step {step}, {clock(moment)}</title></path>'
        )
    return parts + _row_end(run, stage, y, scale)


def _row_end(run: RunReport, stage: StageReport, y: float, scale: _Scale) -> list[str]:
    """At the right edge: the time in the stage and its step; behind the last bar: its gates."""
    if not stage.attempts:
        return [f'<text x="{WIDTH}" y="{y + 22}" text-anchor="end">{escape(stage.phase)}</text>']
    seconds = sum(until(run, attempt) - attempt.started for attempt in stage.attempts)
    of = f" / {short_number(stage.total_steps)}" if stage.total_steps and stage.total_steps != stage.steps else ""
    parts = [
        f'<text class="name" x="{WIDTH}" y="{y + 20}" text-anchor="end">{span(seconds)}</text>',
        f'<text x="{WIDTH}" y="{y + 35}" text-anchor="end">{short_number(stage.steps)}{of} steps</text>',
    ]
    x = scale.x(until(run, stage.attempts[-1])) + 10
    for gate in stage.gates:
        passed = gate.get("event") == "gate_passed"
        told = f"gate {gate.get('metric')}: {short_number(gate.get('value'))}, {'passed' if passed else 'missed'}"
        kind = "passed" if passed else "missed"
        parts.append(
            f'<g class="gate {kind}"><path d="M{x:.1f} {y + 9.5} l8 8 l-8 8 l-8 -8 z"/>'
            f'<text x="{x:.1f}" y="{y + 21.5}" text-anchor="middle">{"✓" if passed else "✗"}</text><title>{escape(told)}</title></g>'
        )
        x += 19
    return parts


def _hand_over(stage: StageReport, number: int, places: dict[str, int], run: RunReport, scale: _Scale) -> list[str]:
    """An arrow from the end of the stage that gave its weights to the start of this one."""
    source = places.get(stage.starts_from or "")
    if source is None or not stage.attempts or not run.stages[source].attempts:
        return []
    x1 = scale.x(until(run, run.stages[source].attempts[-1]))
    x2 = scale.x(stage.attempts[0].started)
    y1, y2 = TOP + ROW * source + 26, TOP + ROW * number + 8
    middle = y1 + 12
    path = f"M{x1:.1f} {y1} V{middle:.1f} H{x2:.1f} V{y2}" if abs(x2 - x1) > 1 else f"M{x2:.1f} {y1} V{y2}"
    return [f'<path class="handover" d="{path}"/><path class="tip" d="M{x2:.1f} {y2} l-3.5 -6 h7 z"/>']
