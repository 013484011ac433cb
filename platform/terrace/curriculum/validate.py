"""`terrace validate`: what a recipe will do, in numbers that follow from it alone (parameters, tokens, steps)."""

from __future__ import annotations

from typing import Any

from terrace.curriculum.graph import source_stage
from terrace.curriculum.watch import planned_steps
from terrace.recipe.changes import stage_recipe
from terrace.recipe.schema import PARTS, Recipe
from terrace.recipe.stretches import stretches


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Plain values for people and programs. Builds the model on the meta device: seconds, no weights."""
    from terrace.data.family import family_of
    from terrace.models.build import parameter_counts
    from terrace.models.taken import check_taken
    from terrace.planner.adapters import with_adapters
    from terrace.planner.parameters import trainable_counts, trains_whole
    from terrace.planner.shapes import model_shape

    check_taken(recipe)
    begin = parameter_counts(recipe)
    stages = []
    for index, stage in enumerate(recipe.stages):
        seen = stage_recipe(recipe, index)
        family, counts = family_of(seen.model), begin if seen is recipe else parameter_counts(seen)
        trained = [part for part in PARTS if getattr(stage.train, part)]
        whole = all(trains_whole(stage, part) for part in trained)
        numbers = counts if whole else trainable_counts(with_adapters(model_shape(seen), stage, seen.model), stage)
        stages.append(
            {
                "name": stage.name,
                "objective": stage.objective,
                "model": seen.model.architecture,
                "parameters": sum(counts.values()),
                "trains": {part: getattr(stage.train, part).lr for part in trained},
                "trained_parameters": sum(numbers[part] for part in trained),
                "starts_from": source_stage(recipe, index),
                "sequence_length": stage.sequence_length,
                "batch_packs": stage.batch.packs,
                "max_visual_tokens_per_image": max(family.largest_image_tokens(part.pixels.max) for _, part in stretches(stage)),
                "precision": stage.precision,
                "strategy": stage.parallel.strategy,
                "workers": stage.resources.workers,
                "budget": stage.budget.model_dump(exclude_none=True),
                "steps": planned_steps(stage),
                "mixture": dict(stage.mixture.weights),
                "changes": [change.model_dump(exclude_none=True) for change in stage.changes],
            }
        )
    return {
        "name": recipe.name,
        "parameters": {**begin, "total": sum(begin.values())},
        "stands_in_for": recipe.model.stands_in_for,
        "notes": list(recipe.notes),
        "stages": stages,
    }


def print_description(description: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)  # nobody's window: a log file must not cut the columns
    parameters = ", ".join(f"{part} {count:,}" for part, count in description["parameters"].items())
    count = len(description["stages"])
    console.print(f"[bold]{escape(description['name'])}[/] is valid: {count} stage{'s' if count > 1 else ''}", soft_wrap=True)
    console.print(f"parameters: {parameters}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in (
        "stage",
        "trains, lr",
        "parameters",
        "sequence",
        "batch",
        "budget",
        "steps",
        "precision",
        "strategy",
        "workers",
    ):
        table.add_column(name, no_wrap=True, justify="right" if name in ("parameters", "sequence", "batch", "steps") else "left")
    for number, stage in enumerate(description["stages"], start=1):
        budget = ", ".join(f"{_short(value)} {unit}" for unit, value in stage["budget"].items())
        workers = stage["workers"] if isinstance(stage["workers"], int) else "-".join(map(str, stage["workers"]))
        table.add_row(
            f"{number} {escape(stage['name'])}",
            "\n".join(f"{part} {lr:g}" for part, lr in stage["trains"].items()),
            f"{stage['trained_parameters']:,}",
            f"{stage['sequence_length']:,}",
            f"{stage['batch_packs']:,}",
            budget,
            f"{stage['steps']:,}" if stage["steps"] else "by data",
            stage["precision"],
            stage["strategy"],
            str(workers),
        )
    console.print(table)
    if description["stands_in_for"]:
        console.print(f"stands in for: {escape(description['stands_in_for'])}", soft_wrap=True)
    for note in description["notes"]:
        console.print(f"note: {escape(note)}", style="dim", soft_wrap=True)


def _short(value: float) -> str:
    """`300e9` -> `300B`; small numbers as they are."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
