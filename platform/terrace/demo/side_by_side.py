"""The part of the demo's page that sets stages beside each other: right answers per kind, and single questions as they were answered."""

from __future__ import annotations

from html import escape

from terrace.demo.results import TASKS, Results, Said, Shown
from terrace.page import picture_address

STYLE = """
.sides td { vertical-align: top; white-space: normal; text-align: left; min-width: 120px; overflow-wrap: anywhere; }
.sides th { text-align: left; }
.sides td:first-child { min-width: 190px; }
.sides .asked { display: flex; gap: 12px; align-items: flex-start; }
.sides img { width: 76px; height: 76px; object-fit: contain; border-radius: 6px; border: 1px solid var(--line); flex: none; }
.sides .words { color: var(--muted); font-size: 13px; white-space: pre-line; }
.sides .said { font-size: 13.5px; white-space: pre-line; }
.sides .said::before { font-weight: 700; margin-right: 6px; }
.sides .good::before { content: "\\2713"; color: var(--right); }
.sides .bad::before { content: "\\00d7"; color: var(--wrong); }
.share { display: flex; gap: 9px; align-items: center; justify-content: flex-end; }
.share .track { background: var(--soft); border-radius: 5px; width: 60px; height: 8px; overflow: hidden; flex: none; }
.share .fill { background: var(--right); height: 100%; }
.share b { min-width: 3.2em; }
@media (max-width: 1000px), print { .share .track { display: none; } }
td.fell b { color: var(--wrong); }
"""


def right_answers(results: Results) -> str:
    """How many held-out questions of each kind are right after every stage; '' where no rule can judge any."""
    if not results.scores:
        return ""
    stages = list(results.stage_scores.items()) or [("", results.scores)]
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in stages)
    rows = []
    for kind, (_, asked) in results.scores.items():
        pairs = [scores.get(kind, (0, asked)) for _, scores in stages]
        rows.append(f"<tr><td>{escape(TASKS.get(kind, kind))}</td>{_shares(pairs)}</tr>")
    totals = [(sum(r for r, _ in scores.values()), sum(n for _, n in scores.values())) for _, scores in stages]
    rows.append(f"<tr><td><b>All</b></td>{_shares(totals)}</tr>")
    return (
        "<h2>Right answers to held-out questions, after each stage</h2>\n"
        f'<div class="panel"><table><tr><th>task</th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _shares(pairs: list[tuple[int, int]]) -> str:
    cells = []
    for place, (right, asked) in enumerate(pairs):
        fell = ' class="fell"' if place and right < pairs[place - 1][0] else ""
        width = f"{100 * right / max(1, asked):.0f}"
        cells.append(
            f'<td{fell}><div class="share"><div class="track"><div class="fill" style="width:{width}%"></div></div>'
            f"<b>{right} of {asked}</b></div></td>"
        )
    return "".join(cells)


def same_questions(results: Results, most: int = 9) -> str:
    """Questions in rows, stages in columns: what the model said after each of them. One question of every kind."""
    chosen: dict[str, Shown] = {}
    for item in results.shown:
        if len(item.by_stage) > 1:
            chosen.setdefault(item.kind, item)
    items = list(chosen.values())[:most]
    if not items:
        return ""
    head = "".join(f"<th>after {escape(said.stage)}</th>" for said in items[0].by_stage)
    rows = "".join(f"<tr><td>{_question(item)}</td>{''.join(map(_cell, item.by_stage))}</tr>" for item in items)
    return (
        "<h2>The same question after every stage</h2>\n"
        f'<div class="panel"><table class="sides"><tr><th>question</th>{head}</tr>{rows}</table></div>'
    )


def _question(item: Shown) -> str:
    image = f'<img alt="" src="{picture_address(item.picture)}">' if item.picture is not None else ""
    return f'<div class="asked">{image}<span class="words">{escape(item.question or TASKS.get(item.kind, item.kind))}</span></div>'


def _cell(said: Said) -> str:
    text = " ".join(said.text.split())
    text = text if len(text) <= 90 else text[:86].rstrip() + " ..."
    verdict = "" if said.right is None else " good" if said.right else " bad"
    return f'<td><span class="said{verdict}">{escape(text) or "(nothing)"}</span></td>'
