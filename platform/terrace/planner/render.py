"""A plan as JSON values and as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from terrace.planner.changes import Change
from terrace.planner.memory import Memory
from terrace.planner.plan import Plan, StagePlan
from terrace.planner.reduction import reduces_every_pack
from terrace.planner.rollouts import rollout_values
from terrace.recipe.schema import PARTS

GIB = 2**30


# ---------------------------------------------------------------- JSON


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values. Bytes, FLOPs and hours are plain numbers; null: not known without an index."""
    stages = [_stage_values(stage, plan) for stage in plan.stages]
    peak = max(plan.stages, key=lambda stage: stage.memory.total)
    largest = max(plan.stages, key=lambda stage: sum(stage.trainable.values()))
    summed = ("tokens", "samples", "steps", "flops", "recompute_flops", "hours", "gpu_hours", "cost", "storage_bytes")
    return {
        "recipe": plan.recipe.name,
        "gpu": {"name": plan.gpu_name, **plan.gpu.model_dump(exclude={"price_per_hour"})},
        "mfu": plan.mfu,
        "price_per_gpu_hour": plan.price_per_gpu_hour,
        "usable_bytes_per_gpu": round(peak.usable_bytes),
        "stages": stages,
        "total": {
            "parameters": stages[0]["parameters"],
            "trainable_parameters": sum(largest.trainable.values()),
            **{name: _sum(stage[name] for stage in stages) for name in summed},
            "memory_per_gpu_bytes": _memory_values(peak.memory),
            "fits": plan.fits,
        },
    }


def _stage_values(stage: StagePlan, plan: Plan) -> dict[str, Any]:
    work, batch = stage.work, stage.stage.batch.packs
    recompute = sum(stage.pack_flops.recompute.values()) * batch
    forward = {part: stage.pack_flops.forward[part] * batch for part in PARTS}
    backward = {part: stage.pack_flops.backward[part] * batch for part in PARTS}
    return {
        "name": stage.name,
        "model": stage.architecture,
        "parameters": {**stage.parameters, "total": sum(stage.parameters.values())},
        "active_parameters": sum(stage.active.values()),
        "trainable_parameters": sum(stage.trainable.values()),
        "trainable_parameters_per_part": dict(stage.trainable),
        "sequence_length": stage.stage.sequence_length,
        "batch_packs": batch,
        "tokens": None if work.tokens is None else round(work.tokens),
        "samples": None if work.samples is None else round(work.samples),
        "steps": work.steps,
        "sources": {
            name: {"share_of_samples": share.share, "samples": share.samples, "epochs": share.epochs}
            for name, share in work.sources.items()
        },
        "exact": work.exact,
        "strategy": stage.stage.parallel.strategy,
        "reduce_every_pack": reduces_every_pack(stage.stage, stage.workers),
        "workers": stage.workers,
        "gpus": stage.gpus,
        "memory_per_gpu_bytes": _memory_values(stage.memory),
        "activations_with_checkpointing": _activation_values(stage.memory_checkpointed),
        "activations_without_checkpointing": _activation_values(stage.memory_kept),
        "host_bytes_per_gpu": round(stage.memory.host),
        "flops": stage.flops,
        "recompute_flops": None if work.steps is None else recompute * work.steps,
        "flops_per_step": {"forward": forward, "backward": backward, "recompute": recompute},
        "reference_flops": stage.reference_flops,
        "step_seconds": stage.step_seconds,
        "reference_seconds": stage.reference_seconds,
        "hours": stage.hours,
        "gpu_hours": stage.gpu_hours,
        "cost": None if stage.gpu_hours is None else stage.gpu_hours * plan.price_per_gpu_hour,
        "checkpoint_bytes": round(stage.checkpoint_bytes),
        "storage_bytes": round(stage.storage_bytes),
        "read_bytes_per_second": stage.read_bytes_per_second,
        "fits": stage.fits,
        "changes": [_change_values(change, stage) for change in stage.changes],
        "notes": stage.notes,
        **({"rollouts": rollout_values(stage.rollouts)} if stage.rollouts is not None else {}),
    }


def _memory_values(memory: Memory) -> dict[str, int]:
    values = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "activations_vision": memory.vision_activations,
        "activations_language": memory.language_activations,
        "logits": memory.logits,
        "buffers": memory.buffers,
        "total": memory.total,
    }
    return {name: round(value) for name, value in values.items()}


def _activation_values(memory: Memory) -> dict[str, int]:
    return {
        "vision": round(memory.vision_activations),
        "language": round(memory.language_activations),
        "total": round(memory.activations),
    }


def _change_values(change: Change, stage: StagePlan) -> dict[str, Any]:
    return {
        "overrides": change.describe(stage.name, stage.workers),
        "gpus": change_gpus(change, stage),
        "memory_per_gpu_bytes": round(change.memory.total) if change.memory else None,
    }


def change_gpus(change: Change, stage: StagePlan) -> int:
    """GPUs of the stage after the change."""
    return round(change.workers * stage.gpus / stage.workers)


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if any(value is None for value in known) else sum(value for value in known if value is not None)


# ---------------------------------------------------------------- table


def print_plan(plan: Plan, width: int | None = None) -> None:
    """One column per stage, a total, then what does not fit and what would."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=width, highlight=False)
    if width is None and not console.is_terminal:
        console.width = 168  # a file or a pipe has no width of its own; wrapping cells would make it unreadable
    gpu = plan.gpu
    console.print(
        f"[bold]{plan.recipe.name}[/bold] on {_gpu_range(plan)} x {plan.gpu_name} "
        f"({gpu.memory_gib:.0f} GiB, {gpu.bf16_tflops:g} TFLOP/s bf16 dense; {gpu.source})"
    )
    console.print(
        f"[dim]time at {plan.mfu:.0%} of peak (MFU), cost at {plan.price_per_gpu_hour:g} per GPU hour; "
        "memory for the worst pack a stage allows[/dim]"
    )
    table = Table(show_edge=False, pad_edge=False, header_style="bold", row_styles=[""])
    table.add_column("")
    for number, stage in enumerate(plan.stages, 1):
        table.add_column(f"{number} {stage.name}", justify="right")
    table.add_column("total", justify="right")
    for section in (_model_rows, _work_rows, _memory_rows, _storage_rows):
        for row in section(plan):
            table.add_row(*row)
        table.add_section()
    console.print()
    console.print(table)
    _print_advice(plan, console)


Cell = Callable[[StagePlan], str]


def _row(title: str, plan: Plan, cell: Cell, total: str = "") -> list[str]:
    return [title, *(cell(stage) for stage in plan.stages), total]


def _how_it_trains(stage: StagePlan, part: str) -> str:
    training = getattr(stage.stage.train, part)
    if training is None:
        return "[dim]frozen[/dim]"
    return "adapters" if training.lora else "some of it" if training.only else "trains"


def _model_rows(plan: Plan) -> list[list[str]]:
    def part(name: str) -> Cell:
        return lambda stage: _how_it_trains(stage, name)

    parameters, active = plan.stages[0].parameters, sum(plan.stages[0].active.values())
    if any(stage.architecture != plan.stages[0].architecture for stage in plan.stages):  # stages bring models of their own
        return [
            _row("model", plan, lambda s: s.architecture),
            *(_row(name, plan, part(name)) for name in PARTS),
            _row("parameters", plan, lambda s: si(sum(s.parameters.values()))),
            _row("trained parameters", plan, lambda s: si(sum(s.trainable.values()))),
        ]
    rows = [_row(f"{name} ({si(parameters[name])})", plan, part(name)) for name in PARTS]
    if active != sum(parameters.values()):  # a mixture of experts
        rows.append(_row("parameters a token meets", plan, lambda s: si(sum(s.active.values())), f"of {si(sum(parameters.values()))}"))
    return [
        *rows,
        _row("trained parameters", plan, lambda s: si(sum(s.trainable.values())), f"of {si(sum(parameters.values()))}"),
    ]


def _about(value: float | None, exact: bool) -> str:
    return si(value) if exact or value is None else f"~{si(value)}"


def _work_rows(plan: Plan) -> list[list[str]]:
    price = plan.price_per_gpu_hour
    stages = plan.stages
    return [
        _row("tokens", plan, lambda s: si(s.work.tokens), si(_sum(s.work.tokens for s in stages))),
        _row("samples", plan, lambda s: _about(s.work.samples, s.work.exact or bool(s.stage.budget.samples)),
             _about(_sum(s.work.samples for s in stages), all(s.work.exact for s in stages))),
        _row("batch (packs x tokens)", plan, lambda s: f"{s.stage.batch.packs:,} x {s.stage.sequence_length:,}"),
        _row("optimizer steps", plan, lambda s: count(s.work.steps), count(_sum(s.work.steps for s in stages))),
        _row("model FLOPs", plan, lambda s: power(s.flops), power(_sum(s.flops for s in stages))),
        _row("GPUs", plan, lambda s: f"{s.gpus} {s.stage.parallel.strategy}"),
        _row("step", plan, lambda s: duration(s.step_seconds)),
        *([_row("reference, before the steps", plan, lambda s: duration(s.reference_seconds) if s.reference_seconds else "")]
          if any(stage.reference_seconds for stage in stages) else []),
        _row("time", plan, lambda s: duration(_seconds(s.hours)), duration(_seconds(_sum(s.hours for s in stages)))),
        _row("GPU hours", plan, lambda s: count(s.gpu_hours), count(_sum(s.gpu_hours for s in stages))),
        _row("cost", plan, lambda s: count(_times(s.gpu_hours, price)),
             count(_times(_sum(s.gpu_hours for s in stages), price))),
        _row("data to read", plan, lambda s: f"{size(s.read_bytes_per_second)}/s"),
    ]  # fmt: skip


def _memory_rows(plan: Plan) -> list[list[str]]:
    peak = max(plan.stages, key=lambda stage: stage.memory.total)

    def field(name: str) -> Cell:
        return lambda stage: size(getattr(stage.memory, name))

    titles = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "vision_activations": "activations, vision",
        "language_activations": "activations, language",
        "working": "one block at work",
        "logits": "logits",
        "buffers": "buffers and copies",
    }
    rows = [_row(title, plan, field(name), size(getattr(peak.memory, name))) for name, title in titles.items()]
    rows.append(
        _row(
            "[dim]language, kept / recomputed[/dim]",
            plan,
            lambda s: f"[dim]{size(s.memory_kept.language_activations)} / {size(s.memory_checkpointed.language_activations)}[/dim]",
        )
    )
    rows.append(
        _row(
            "[bold]memory per GPU[/bold]",
            plan,
            lambda s: f"[bold]{size(s.memory.total)}[/bold]",
            size(peak.memory.total),
        )
    )
    rows.append(
        _row(
            f"of {size(peak.usable_bytes)} usable",
            plan,
            lambda s: (
                f"[green]fits ({s.memory.total / s.usable_bytes:.0%})[/green]"
                if s.fits
                else f"[bold red]does NOT fit ({s.memory.total / s.usable_bytes:.0%})[/bold red]"
            ),
            "[green]fits[/green]" if plan.fits else "[bold red]does NOT fit[/bold red]",
        )
    )
    return rows


def _storage_rows(plan: Plan) -> list[list[str]]:
    return [
        _row("one checkpoint", plan, lambda s: size(s.checkpoint_bytes)),
        _row("kept on storage", plan, lambda s: size(s.storage_bytes), size(sum(s.storage_bytes for s in plan.stages))),
    ]


def _print_advice(plan: Plan, console: Any) -> None:
    if any(not stage.work.exact for stage in plan.stages):
        planning = plan.recipe.planning
        console.print(
            f"\n[dim]~ assumed, no index given (--data, --index): {planning.tokens_per_sample:g} tokens per sample, "
            f"{planning.visual_token_share:.0%} of them visual where a source has images (see planning in the recipe)[/dim]"
        )
    for stage in plan.stages:
        for note in stage.notes:
            console.print(f"[yellow]note[/yellow] {stage.name}: {note}")
    for stage in plan.stages:
        if stage.fits:
            continue
        console.print(
            f"\n[bold red]{stage.name} does not fit[/bold red]: {size(stage.memory.total)} of {size(stage.usable_bytes)} usable. "
            + ("It fits with" if stage.changes else "No change of strategy, recomputation, offload or GPUs that was tried fits.")
        )
        for number, change in enumerate(stage.changes):
            gpus = change_gpus(change, stage)
            needs = f"{size(change.memory.total)} per GPU" if change.memory else ""
            more = f" on {gpus} GPUs" if gpus != stage.gpus else ""
            console.print(f"  {'or ' if number else ''}{needs}{more}:")
            for line in change.describe(stage.name, stage.workers):
                console.print(f"    {line}", markup=False)


def _gpu_range(plan: Plan) -> str:
    counts = sorted({stage.gpus for stage in plan.stages})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


# ---------------------------------------------------------------- numbers


def si(value: float | None) -> str:
    """1400000000000 -> `1.40T`; None -> `?`."""
    if value is None:
        return "?"
    for factor, letter in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "B"),
        (1e6, "M"),
        (1e3, "K"),
    ):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def power(value: float | None) -> str:
    """9.12e+21 -> `9.12e21`."""
    return "?" if value is None else f"{value:.2e}".replace("e+0", "e").replace("e+", "e")


def count(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,.0f}" if value >= 10 or float(value).is_integer() else f"{value:.2g}"


def size(value: float) -> str:
    """Bytes in binary units."""
    for factor, unit in ((2**50, "PiB"), (2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:,.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for factor, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.1f} {unit}"
    if seconds < 0.1:
        return f"{seconds * 1000:.2g} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else hours * 3600


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
