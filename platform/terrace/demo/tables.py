"""The demo's result on a terminal: held-out loss per kind and stage, rewards per task, and some of the model's answers."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from terrace.demo.results import RL_TASKS, TASKS, Results


def print_losses(results: Results, console: Console) -> None:
    """One row per kind of sample, one column per stage: held-out loss before and after."""
    table = Table(title="\nLoss on held-out samples, before -> after each stage", title_justify="left", title_style="bold")
    table.add_column("kind")
    for number, stage in enumerate(results.supervised, start=1):
        table.add_column(f"{number} {stage.name}\n{stage.steps} steps, {stage.seconds:.0f} s", justify="right")
    kinds = [*TASKS, "text"]
    kinds += sorted({kind for stage in results.supervised for kind in stage.after} - set(kinds))
    for kind in kinds:
        if not any(kind in stage.after for stage in results.supervised):
            continue
        cells = []
        for stage in results.supervised:
            if kind not in stage.after:
                cells.append("")
                continue
            before, after = stage.before.get(kind, math.nan), stage.after[kind]
            colour = "green" if after < before else "red"
            cells.append(f"{before:.3f} -> [{colour}]{after:.3f}[/{colour}]")
        table.add_row(kind, *cells)
    console.print(table)


def print_rewards(results: Results, console: Console) -> None:
    """One row per task of an RL stage: mean reward of held-out prompts before and after it."""
    for stage in results.reinforced:
        title = f"\nMean reward (0 to 1) on held-out prompts, before -> after stage {results.stages.index(stage) + 1} {stage.name}"
        table = Table(title=f"{title}: {stage.steps} steps, {stage.seconds:.0f} s", title_justify="left", title_style="bold")
        table.add_column("task")
        table.add_column("sampled answers", justify="right")
        table.add_column("greedy answer", justify="right")
        for task, after in stage.after.items():
            pairs = [(stage.before.get(task, math.nan), after), stage.greedy.get(task, (math.nan, math.nan))]
            table.add_row(RL_TASKS.get(task, task), *(_change(*pair) for pair in pairs))
        console.print(table)


def _change(before: float, after: float) -> str:
    colour = "green" if after > before else "red"
    return f"{before:.3f} -> [{colour}]{after:.3f}[/{colour}]"


def print_scores(results: Results, console: Console) -> None:
    """One row per kind of question, one column per stage: how many held-out ones its model answers right."""
    if not results.scores:
        return
    table = Table(title="\nRight answers to held-out questions, after each stage", title_justify="left", title_style="bold")
    table.add_column("task")
    for name in ("questions", *results.stage_scores):
        table.add_column(name, justify="right")
    for kind, (_, asked) in results.scores.items():
        table.add_row(TASKS.get(kind, kind), str(asked), *(str(scores.get(kind, (0, 0))[0]) for scores in results.stage_scores.values()))
    totals = [str(sum(right for right, _ in scores.values())) for scores in results.stage_scores.values()]
    table.add_row("[bold]all[/bold]", str(results.asked), *totals)
    console.print(table)


def print_answers(results: Results, console: Console, most: int = 12) -> None:
    """A question, the model's answer and, where it is wrong, the right one: one of each kind first."""
    table = Table(title="\nIn its own words, on pictures it has never seen", title_justify="left", title_style="bold")
    for name in ("kind", "question", "answer", "expected"):
        table.add_column(name, overflow="fold")
    by_kind: dict[str, list] = {}
    for item in results.shown:
        by_kind.setdefault(item.kind, []).append(item)
    rounds = [items[turn] for turn in range(3) for items in by_kind.values() if len(items) > turn]
    for item in rounds[:most]:
        answer = _short(item.answer)
        table.add_row(
            item.kind,
            _short(item.question) or "(describe)",
            answer if item.right is None else f"[green]{answer}[/green]" if item.right else f"[red]{answer}[/red]",
            "" if item.right else _short(item.expected),
        )
    console.print(table)


def _short(text: str, most: int = 140) -> str:
    flat = " ".join(text.split()).replace("[", "\\[")
    return flat if len(flat) <= most else flat[: most - 4] + " ..."
