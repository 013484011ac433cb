"""The result as one self-contained HTML page: what was trained, how the losses moved, and pictures with answers.

No script, no outside file: pictures are embedded, marks and curves are inline SVG. It can be mailed or opened from a disk.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from terrace.demo import side_by_side
from terrace.demo.results import RL_TASKS, TASKS, Results, Shown, StageLosses
from terrace.page import document, facts, picture_address

STAGE_COLOURS = ("#c2630a", "#0f7b8a", "#3355d6", "#8b3fc4", "#b02a5b", "#5a6b1f")

STYLE = side_by_side.STYLE + """
.curve text { font: 12px system-ui, sans-serif; fill: var(--muted); }
.curve .rule { stroke: var(--soft); }
.curve .border { stroke: var(--faint); stroke-dasharray: 3 4; }
td .arrow { color: var(--faint); padding: 0 5px; }
td b { font-weight: 600; }
td.up b { color: var(--wrong); }
.none { color: var(--faint); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 18px; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; display: flex;
  flex-direction: column; break-inside: avoid; }
.card figure { margin: 0; background: var(--soft); border-bottom: 1px solid var(--line); }
.card svg.picture { display: block; width: 100%; height: auto; max-height: 290px; }
.card .says { padding: 12px 16px 16px; }
.card .task { font-size: 11px; letter-spacing: 0.06em; text-transform: uppercase; color: var(--muted); }
.card .question { color: var(--muted); font-size: 13.5px; margin-top: 4px; white-space: pre-line; }
.card .answer { margin-top: 6px; font-size: 16px; padding-left: 25px; position: relative; overflow-wrap: anywhere;
  white-space: pre-line; }
.card .answer::before { position: absolute; left: 0; top: 4px; width: 16px; height: 16px; border-radius: 50%; color: #fff;
  font-size: 11px; line-height: 16px; text-align: center; font-weight: 700; }
.right .answer::before { content: "\\2713"; background: var(--right); }
.open .answer::before { content: ""; background: var(--faint); width: 8px; height: 8px; left: 4px; top: 8px; }
.wrong .answer::before { content: "\\00d7"; background: var(--wrong); }
.card .expected { color: var(--muted); font-size: 13px; padding-left: 25px; margin-top: 2px; white-space: pre-line;
  overflow-wrap: anywhere; }
@media print { .right .answer::before { color: var(--right); background: none; font-size: 14px; }
  .wrong .answer::before { color: var(--wrong); background: none; font-size: 14px; } }
"""


def write_page(results: Results, path: Path, subtitle: str) -> Path:
    """Writes the page and returns its path."""
    figures = [(f"{100 * results.right / results.asked:.0f} %", "held-out questions right")] if results.asked else []
    figures += [
        (_minutes(sum(stage.seconds for stage in results.stages)), "training"),
        (f"{results.parameters / 1e6:.1f} M", "parameters"),
        (str(len(results.stages)), "stages" if len(results.stages) > 1 else "stage"),
        (f"{sum(stage.steps for stage in results.stages):,}", "optimizer steps"),
        (f"{sum(stage.tokens for stage in results.stages) / 1e6:.2f} M", "tokens"),
    ]
    first = len({item.kind for item in results.shown})
    body = f"""
<h1>What the model says about pictures it has never seen</h1>
<p class="lead">{escape(subtitle)}</p>
{facts(figures)}
<h2>In its own words</h2>
<div class="cards">{"".join(_card(item) for item in results.shown[:first])}</div>
<p class="note">Solid marks are the model's, dashed ones the truth. A box is right from an overlap (IoU) of 0.5 on.
Answers are greedy; no picture here was seen in training. {_choice(results)}</p>
{side_by_side.right_answers(results)}
{side_by_side.same_questions(results)}
<h2>One curriculum, {len(results.stages)} stage{"s" if len(results.stages) > 1 else ""}</h2>
<div class="panel">{_curve(results.supervised)}</div>
<h2>Loss on held-out samples, before and after each stage</h2>
<div class="panel">{_table(results.supervised)}</div>
{"".join(_rewards(stage) for stage in results.reinforced)}
{_more(results.shown[first:])}
<footer>{escape(results.name)}, written by <code>terrace demo</code>.</footer>"""
    path.write_text(document(results.name, body, STYLE), encoding="utf-8")
    return path


def _choice(results: Results) -> str:
    """How the cards were chosen, said where some answers are wrong."""
    wrong = results.asked - results.right
    return f"Of each kind right answers stand first and a wrong one last; {wrong} of {results.asked} are wrong." if wrong else ""


def _more(shown: list[Shown]) -> str:
    return f'<h2>More answers</h2>\n<div class="cards">{"".join(_card(item) for item in shown)}</div>' if shown else ""


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


# ---------------------------------------------------------------- training curve


def _curve(stages: list[StageLosses]) -> str:
    """Training loss over all steps on a logarithmic scale; one colour per stage."""
    width, height, left, top, bottom = 1080, 260, 44, 34, 26
    smooth = [_smoothed(stage.curve) for stage in stages]
    values = [value for curve in smooth for value in curve]
    if not values:
        return ""
    low, high = math.log(max(0.01, min(values)) * 0.92), math.log(max(values) * 1.08)
    steps = sum(len(curve) for curve in smooth)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - 8) * step / max(1, steps - 1)
        return x, top + (height - top - bottom) * (high - math.log(max(0.01, loss))) / (high - low)

    parts = []
    for mark in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10):
        if low <= math.log(mark) <= high:
            y = at(0, mark)[1]
            parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
            parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
    start = 0
    for place, (stage, curve) in enumerate(zip(stages, smooth)):
        colour = STAGE_COLOURS[place % len(STAGE_COLOURS)]
        points = " ".join("{:.1f},{:.1f}".format(*at(start + step, loss)) for step, loss in enumerate(curve))
        x1 = at(start, 1)[0]
        if place:
            parts.append(
                f'<line x1="{x1:.1f}" x2="{x1:.1f}" y1="{top - 8}" y2="{height - bottom}" class="border"/>'
            )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>')
        # Short stages lie close together: their names take turns at two heights. The last one's ends before the edge.
        y = 12 if place % 2 == 0 else 27
        x = min(x1 + 5, width - 8 - 7.5 * len(stage.name))
        parts.append(f'<text x="{x:.1f}" y="{y}" style="fill:{colour};font-weight:600">{escape(stage.name)}</text>')
        start += len(curve)
    parts.append(f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">{steps:,} steps</text>')
    parts.append(f'<text x="{left}" y="{height - 6}">training loss (log scale)</text>')
    return f'<svg class="curve" viewBox="0 0 {width} {height}" width="100%" role="img">{"".join(parts)}</svg>'


def _smoothed(curve: list[float], parts: int = 40) -> list[float]:
    """A centred mean over about a `parts`-th of the stage, without reaching into its neighbours."""
    half = max(1, len(curve) // (2 * parts))
    return [sum(part) / len(part) for part in (curve[max(0, at - half) : at + half + 1] for at in range(len(curve)))]


# ---------------------------------------------------------------- tables


def _table(stages: list[StageLosses]) -> str:
    kinds = [kind for kind in (*TASKS, "text") if any(kind in stage.after for stage in stages)]
    kinds += sorted({kind for stage in stages for kind in stage.after} - set(kinds))
    head = "".join(
        f'<th><i style="background:{STAGE_COLOURS[place % len(STAGE_COLOURS)]}"></i>{escape(stage.name)}</th>'
        for place, stage in enumerate(stages)
    )
    rows = []
    for kind in kinds:
        cells = "".join(_cell(stage, kind) for stage in stages)
        rows.append(f"<tr><td>{escape(kind)}</td>{cells}</tr>")
    return f"<table><tr><th>kind of sample</th>{head}</tr>{''.join(rows)}</table>"


def _cell(stage: StageLosses, kind: str) -> str:
    if kind not in stage.after:
        return '<td class="none">–</td>'
    before, after = stage.before.get(kind, math.nan), stage.after[kind]
    rose = ' class="up"' if after > before else ""
    return f'<td{rose}>{before:.3f}<span class="arrow">→</span><b>{after:.3f}</b></td>'


def _rewards(stage: StageLosses) -> str:
    """An RL stage: mean reward of every task over its iterations; of held-out prompts before and after, sampled and greedy."""
    rows = []
    for place, (task, after) in enumerate(stage.after.items()):
        before = stage.before.get(task, math.nan)
        fell = ' class="up"' if after < before else ""
        line = _small_curve(stage.rewards.get(task, []), STAGE_COLOURS[place % len(STAGE_COLOURS)])
        first, last = stage.greedy.get(task, (math.nan, math.nan))
        rows.append(
            f"<tr><td>{escape(RL_TASKS.get(task, task))}</td><td>{line}</td>"
            f'<td{fell}>{before:.3f}<span class="arrow">→</span><b>{after:.3f}</b></td>'
            f'<td>{first:.3f}<span class="arrow">→</span><b>{last:.3f}</b></td></tr>'
        )
    return (
        f"<h2>Reinforcement learning: {escape(stage.name)}</h2>\n"
        '<div class="panel"><table><tr><th>task</th><th>mean reward in training</th><th>held-out prompts</th><th>greedy answer</th></tr>'
        f"{''.join(rows)}</table></div>"
        f'<p class="note">{stage.steps} steps. A reward lies between 0 and 1; the model\'s own answers were judged by rules.</p>'
    )


def _small_curve(values: list[float], colour: str) -> str:
    """Rewards from 0 (bottom) to 1 (top) over the iterations."""
    width, height = 420, 54
    smooth = _smoothed(values, parts=10)
    at = " ".join(f"{4 + (width - 8) * k / max(1, len(smooth) - 1):.1f},{4 + (height - 8) * (1 - v):.1f}" for k, v in enumerate(smooth))
    rules = "".join(f'<line x1="0" x2="{width}" y1="{y}" y2="{y}" class="rule"/>' for y in (4, height / 2, height - 4))
    line = f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>'
    return f'<svg class="curve" viewBox="0 0 {width} {height}" width="{width}" role="img">{rules}{line}</svg>'


# ---------------------------------------------------------------- pictures


def _card(item: Shown) -> str:
    figure = f"<figure>{_picture(item)}</figure>" if item.picture is not None else ""
    question = f'<div class="question">{escape(_short(item.question))}</div>' if item.question else ""
    expected = "" if item.right else f'<div class="expected">expected {escape(_short(item.expected))}</div>'
    return (
        f'<div class="card {_verdict(item)}">{figure}<div class="says">'
        f'<div class="task">{escape(TASKS.get(item.kind, item.kind))}</div>{question}'
        f'<div class="answer">{escape(_short(item.answer)) or "(nothing)"}</div>{expected}</div></div>'
    )


def _short(text: str, most: int = 240) -> str:
    if text.count("\n") > 5:
        text = " · ".join(line for line in text.split("\n") if line)
    return text if len(text) <= most else text[: most - 4].rstrip() + " ..."


def _verdict(item: Shown) -> str:
    return "open" if item.right is None else "right" if item.right else "wrong"


def _picture(item: Shown) -> str:
    picture = item.picture
    assert picture is not None  # the caller shows pictures only
    width, height = picture.size
    unit = max(width, height) / 224
    marks = ""
    if item.expected_mark and len(item.expected_mark) == 4:
        dashed = f'stroke="#1c2028" stroke-width="{1.6 * unit}" stroke-dasharray="{5 * unit}"'
        marks += _rectangle(item.expected_mark, width, height, dashed)
    if item.found_mark:
        colour = {"right": "#168f52", "wrong": "#d0343a", "open": "#6a7180"}[_verdict(item)]
        if len(item.found_mark) == 4:
            marks += _rectangle(item.found_mark, width, height, f'stroke="#fff" stroke-width="{4 * unit}"')
            marks += _rectangle(item.found_mark, width, height, f'stroke="{colour}" stroke-width="{2.4 * unit}"')
        else:
            x, y = item.found_mark[0] * width, item.found_mark[1] * height
            for radius, fill in ((8, "#fff"), (6.2, colour), (2.2, "#fff")):
                marks += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius * unit:.1f}" fill="{fill}"/>'
    return (
        f'<svg class="picture" viewBox="0 0 {width} {height}" role="img"><image width="{width}" height="{height}" '
        f'href="{picture_address(picture)}"/>{marks}</svg>'
    )


def _rectangle(mark: tuple[float, ...], width: int, height: int, style: str) -> str:
    x1, x2 = sorted((mark[0] * width, mark[2] * width))
    y1, y2 = sorted((mark[1] * height, mark[3] * height))
    return f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" fill="none" {style}/>'
