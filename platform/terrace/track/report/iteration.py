"""The last iteration of each RL stage as lanes over time: prompts, decoding (as high as the batch was full), rewards, training, weights."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from terrace.track.report.numbers import span
from terrace.track.report.read import RunReport

WIDTH, LEFT, RIGHT, ROW, TOP = 1090, 110, 90, 30, 8
LANES = ("weights", "prompts", "decoding", "rewards", "training")


def iteration_part(run: RunReport) -> str:
    """'' where no stage has a trace."""
    parts = []
    for stage in run.stages:
        if stage.trace and stage.trace.get("lanes"):
            heading = f"<h3>{escape(stage.name)}, iteration {int(stage.trace['iteration'])}</h3>"
            parts.append(f'{heading}<div class="panel">{lanes(stage.trace)}</div>')
    note = '<p class="note">A bar is as high as the lane was busy; decoding is full where every place of the batch has a sequence.</p>'
    return "".join(parts) + note if parts else ""


def lanes(trace: Mapping[str, Any]) -> str:
    """An SVG of a trace."""
    seconds = max(float(trace["seconds"]), 1e-9)
    shown = [lane for lane in LANES if trace["lanes"].get(lane)]
    height = TOP + ROW * len(shown) + 22
    scale = (WIDTH - LEFT - RIGHT) / seconds
    parts = []
    for number, lane in enumerate(shown):
        base = TOP + ROW * (number + 1) - 4
        spans = [(min(begin, seconds), min(end, seconds), share) for begin, end, share in trace["lanes"][lane]]
        parts.append(f'<text class="name" x="{LEFT - 10}" y="{base - 6}" text-anchor="end">{lane}</text>')
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        for begin, end, share in spans:
            tall = max(1.0, (ROW - 8) * min(1.0, share))
            parts.append(
                f'<rect class="bar" stroke="none" x="{LEFT + begin * scale:.1f}" y="{base - tall:.1f}" '
                f'width="{max(0.6, (end - begin) * scale):.1f}" height="{tall:.1f}"/>'
            )
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{base - 6}">{busy(spans) / seconds:.0%}</text>')
    for number in range(5):
        x = LEFT + number / 4 * seconds * scale
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{span(number / 4 * seconds) if number else "0"}</text>')
    idle = trace.get("idle")
    told = f"{span(seconds)}" + ("" if idle is None else f", {idle:.0%} of the engine's places idle while groups were wanted")
    frame = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(told)}"'
    return f'<svg class="timeline lanes" {frame}>{"".join(parts)}</svg><p class="note">{escape(told, quote=False)}</p>'


def busy(spans: list[tuple[float, float, float]]) -> float:
    """Seconds in which a lane did something, spans that lie on each other counted once."""
    total, reached = 0.0, 0.0
    for begin, end, share in sorted(spans):
        total += max(0.0, end - max(begin, reached)) * share
        reached = max(reached, end)
    return total
