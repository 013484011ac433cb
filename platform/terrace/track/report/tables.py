"""The report's tables and cards: stages, held-out figures, gates, plan against measurement, checkpoints, events, answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from terrace.recipe.schema import Stage
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.track.report.curves import is_better_high
from terrace.track.report.numbers import clock, file_size, percent, short_number, span
from terrace.track.report.read import RunReport, StageReport

DASH = '<span class="none">–</span>'
MOST_EVENTS = 2000
NOTICED = 0.01  # a smaller share of change is not worth a mark
TROUBLE = (
    "controller_started", "stage_attempt_failed", "stage_attempt_preempted", "stage_attempt_interrupted", "stop_requested", "gate_missed",
    "pause_requested", "suspend_requested", "cancel_requested", "resume_requested", "rerun_requested", "recipe_changed", "stage_cleared",
    "paused", "suspended", "cancelled", "run_failed",
)  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int] = (), kind: str = "") -> str:
    """Cells are HTML. Columns in `texts` hold words: set left and wrapped. '' without rows."""
    if not rows:
        return ""

    def cells(name: str, row: Sequence[str]) -> str:
        return "".join(f"<{name}{' class=text' if place in texts else ''}>{cell}</{name}>" for place, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="panel"><table class="{kind}"><tr>{cells("th", head)}</tr>{body}</table></div>'


def stages_table(run: RunReport) -> str:
    """What each stage is, and what it did."""
    rows = []
    for stage in run.stages:
        wanted = stage.stage
        of = f"<small>of {stage.total_steps:,}</small>" if stage.total_steps and stage.total_steps != stage.steps else ""
        resumed = sum(bool(attempt.first_step) for attempt in stage.attempts)
        rows.append(
            [
                f"<b>{stage.number} {escape(stage.name)}</b><small>{escape(stage.phase)}</small>",
                f"{escape(wanted.objective)}<small>{_trained(wanted)}</small>",
                _batch(wanted),
                f"{wanted.pixels.max:,}<small>at most</small>",
                f"{escape(wanted.parallel.strategy)}, {escape(wanted.precision)}<small>{_workers(stage)}</small>",
                f"{stage.steps:,}{of}",
                f"{stage.tokens:,}",
                _last(stage),
                f"{len(stage.attempts) or DASH}{f'<small>{resumed} resumed</small>' if resumed else ''}",
            ]
        )
    head = ("stage", "objective, parts that train", "batch", "pixels", "layout", "steps", "tokens", "last loss or reward", "attempts")
    return table(head, rows, texts=(1,))


def _trained(stage: Stage) -> str:
    parts = [f"{part} {short_number(training.lr)}" for part, training in stage.train if training is not None]
    return escape(", ".join(parts))


def _workers(stage: StageReport) -> str:
    seen = sorted({checkpoint.workers for checkpoint in stage.checkpoints if checkpoint.workers})
    if seen:
        return f"{' and '.join(str(count) for count in seen)} worker{'s' if seen != [1] else ''}"
    wanted = stage.stage.resources.workers
    return f"workers: {wanted if isinstance(wanted, int) else '{} to {}'.format(*wanted)}"


def _batch(stage: Stage) -> str:
    """What one step is made of."""
    if stage.objective == "grpo":
        options = stage.grpo or GrpoOptions()
        return f"{options.prompts_per_iteration:,} × {options.samples_per_prompt:,}<small>prompts × answers</small>"
    return f"{stage.batch.packs:,} × {stage.sequence_length:,}<small>packs × tokens</small>"


def _last(stage: StageReport) -> str:
    value, measure = stage.figures.last, stage.figures.measure
    if value is None:
        return DASH
    text = f"{value:.4f}" if abs(value) >= 0.001 else short_number(value)
    return f"{text}<small>{measure}</small>" if measure != "loss" else text


def held_out_table(run: RunReport) -> str:
    """Figure per kind before and after each stage; what got worse by more than a hundredth has a triangle."""
    stages = [stage for stage in run.stages if (stage.result or {}).get("evaluation")]
    kinds = dict.fromkeys(kind for stage in stages for kind in stage.result["evaluation"].get("after") or {})
    rows = [[escape(kind), *(_before_after(stage.result["evaluation"], kind) for stage in stages)] for kind in kinds]
    return table(["kind", *(f"{stage.number} {escape(stage.name)}" for stage in stages)], rows)


def _before_after(evaluation: Mapping[str, Any], kind: str) -> str:
    before, after = ((evaluation.get(when) or {}).get(kind) for when in ("before", "after"))
    if after is None:
        return DASH
    if before is None:
        return f"<b>{after:.3f}</b>"
    grown = (after - before) / max(abs(before), 1e-9)
    high = is_better_high(kind)
    sign = f" <span class=failed>{'▼' if high else '▲'}</span>" if (-grown if high else grown) > NOTICED else ""
    return f'{before:.3f}<span class="arrow">→</span><b>{after:.3f}</b>{sign}'


def gates_table(run: RunReport) -> str:
    rows = []
    for stage in run.stages:
        for gate in stage.gates:
            number = gate.get("gate", 0)
            wanted = stage.stage.gates[number] if number < len(stage.stage.gates) else None
            below, above = (gate.get(side, getattr(wanted, side, None)) for side in ("below", "above"))
            bounds = [f"{word} {bound:g}" for word, bound in (("below", below), ("above", above)) if bound is not None]
            passed = gate.get("event") == "gate_passed"
            sign = '<span class="succeeded">✓ passed</span>' if passed else '<span class="failed">✗ missed</span>'
            done = f"<small>{escape(wanted.on_miss)}</small>" if wanted and not passed else ""
            value = gate.get("value")
            rows.append(
                [
                    f"{stage.number} {escape(stage.name)}",
                    f"<code>{escape(str(gate.get('metric')))}</code>",
                    escape(" and ".join(bounds)) or DASH,
                    f"{value:.4f}" if isinstance(value, int | float) else "not measured",
                    sign + done,
                ]
            )
    return table(("gate of stage", "metric", "bound", "measured", "outcome"), rows, texts=(1,))


# ---------------------------------------------------------------- plan


def plan_table(run: RunReport) -> str:
    """Measured values with the planner's beside them. Of a stage in progress the plan's share so far is compared."""
    if run.plan is None:
        return f'<p class="note">{escape(run.plan_note)}</p>'
    rows = []
    for stage in run.stages:
        plan = stage.plan or {}
        share = stage.steps / plan["steps"] if plan.get("steps") else None
        measured = stage.figures
        samples = measured.samples
        seconds = plan["hours"] * 3600 if plan.get("hours") is not None else None
        checkpoint = stage.checkpoints[-1].bytes if stage.checkpoints else None
        rows.append(
            [
                f"<b>{stage.number} {escape(stage.name)}</b>{_parameters(plan, stage.parameters)}",
                _against(stage.steps or None, plan.get("steps"), f"{stage.steps:,}", lambda value: f"{value:,.0f}"),
                _against(stage.tokens or None, plan.get("tokens"), short_number(stage.tokens), short_number, share),
                _against(samples or None, plan.get("samples"), f"{samples:,}", lambda value: f"{value:,.0f}", share),
                _against(stage.seconds or None, seconds, span(stage.seconds), span, share, ratio=False),
                _against(measured.flops_per_second, None, f"{short_number(measured.flops_per_second)}FLOP/s", str, told="measured"),
                _against(checkpoint, plan.get("checkpoint_bytes"), file_size(checkpoint), file_size),
                _against(
                    measured.memory_peak_bytes, (plan.get("memory_per_gpu_bytes") or {}).get("total"),
                    file_size(measured.memory_peak_bytes), file_size, ratio=stage.stage.resources.gpus_per_worker > 0,
                ),
            ]
        )
    head = ("stage", "steps", "tokens", "samples", "time in steps", "FLOP/s reached", "checkpoint", "peak memory")
    gpu = run.plan["gpu"]["name"]
    on = f"Planned: {escape(gpu)} at {percent(run.plan['mfu'])} of its peak, {escape(run.plan_note)}."
    without = all(stage.stage.resources.gpus_per_worker == 0 for stage in run.stages)
    cpu = " This run trained on CPUs: its times are no measure of the plan's." if without else ""
    note = "Planned tokens count sequence positions, measured ones leave out the padding. FLOP/s and peak memory (of one"
    note += " process; on CPUs all that it holds) are measured in the steps that trained alone."
    return table(head, rows, kind="plan") + f'<p class="note">{on}{cpu} {note}</p>'


def _parameters(plan: Mapping[str, Any], measured: int | None) -> str:
    """What the plan counts; and what `final/` holds where that is another number, as with a tokenizer that was trained on few words."""
    if not plan:
        return "<small>not planned</small>"
    total = plan["parameters"]["total"]
    held = f", planned; final/ holds {measured:,}" if measured is not None and measured != total else ""
    return f"<small>{short_number(plan['trainable_parameters'])} of {short_number(total)} parameters train{held}</small>"


def _against(
    measured: float | None, planned: float | None, text: str, unit: Any, share: float | None = None, ratio: bool = True,
    told: str = "no plan",
) -> str:
    """`share` of the plan is done so far; None compares with the whole plan. `told`: what stands where nothing is planned."""
    if measured is None:
        return f"{DASH}<small>plan {unit(planned)}</small>" if planned is not None else DASH
    if planned is None:
        return f"{text}<small>{told}</small>"
    part = planned * min(1.0, share) if share is not None else planned
    return f"{text}<small>plan {unit(planned)}{f' · {percent(measured / part)}' if ratio and part else ''}</small>"


# ---------------------------------------------------------------- checkpoints


def lineage(run: RunReport) -> str:
    """Which stage started from which: a row of boxes in the order of the weights."""
    wanted = run.recipe.model
    start = getattr(wanted, "pretrained", None)
    origin = escape(str(start)) if start else f"seed {wanted.seed}"
    boxes = [f"<div><b>start</b><small>{origin}</small><small>{escape(wanted.architecture)}</small></div>"]
    before = None
    for stage in run.stages:
        newest = stage.checkpoints[-1] if stage.checkpoints else None
        source = stage.starts_from
        other = f"<small>from {escape(source)}</small>" if source and source != before else ""
        weights = f"<small>final {file_size(stage.final_bytes)}</small>" if stage.final_bytes else f"<small>{escape(stage.phase)}</small>"
        marks = f"<small>stage <code>{newest.stage_hash[:10]}</code></small>" if newest else ""
        marks += f"<small>order <code>{_order(newest.data)}</code></small>" if newest else ""
        kind = "" if stage.final_bytes else ' class="pending"'
        boxes.append(f"<div{kind}><b>{stage.number} {escape(stage.name)}</b>{other}{weights}{marks}</div>")
        before = stage.name
    return f'<div class="flow">{"<span>→</span>".join(boxes)}</div>'


def checkpoints(run: RunReport) -> str:
    rows = []
    for stage in run.stages:
        for checkpoint in stage.checkpoints:
            place = ", ".join(f"{key} {value}" for key, value in checkpoint.data.items() if key in ("window", "pack", "iteration"))
            older = "" if checkpoint.recipe_hash == run.recipe_hash else "<small>not the present one</small>"
            rows.append(
                [
                    f"{stage.number} {escape(stage.name)}",
                    f"{checkpoint.step:,}",
                    file_size(checkpoint.bytes),
                    str(checkpoint.attempt or "–"),
                    f"{escape(checkpoint.strategy)} × {checkpoint.workers or '–'}",
                    f"<code>{checkpoint.recipe_hash[:10]}</code>{older}",
                    f"<code>{checkpoint.stage_hash[:10]}</code>",
                    f"<code>{_order(checkpoint.data)}</code><small>{escape(place)}</small>",
                ]
            )
    head = ("checkpoint of", "step", "size", "attempt", "saved by", "recipe", "stage", "place in the data")
    kept = sum(checkpoint.bytes for stage in run.stages for checkpoint in stage.checkpoints)
    finals = sum(stage.final_bytes or 0 for stage in run.stages)
    note = f'<p class="note">On disk now: checkpoints {file_size(kept)}, final weights {file_size(finals)}.</p>' if rows else ""
    return table(head, rows) + note


def _order(data: Mapping[str, Any]) -> str:
    return escape(str(data.get("plan") or data.get("fingerprint") or "–")[:10])


# ---------------------------------------------------------------- events


def trouble_table(run: RunReport) -> str:
    """Everything that was not plain progress, in order."""
    rows = [_event_row(run, event) for event in run.events if event.get("event") in TROUBLE]
    for stage in run.stages:
        for entry in stage.nonfinite:
            samples = ", ".join(str(name) for name in entry.get("samples", [])[:6])
            text = f"step {entry.get('step')}: loss or gradient not finite ({entry.get('policy')}). {samples}"
            rows.append(["", "", f"{stage.number} {escape(stage.name)}", "not finite", escape(text)])
    if not rows:
        return '<p class="note">None: every stage went through in its first attempt, and nobody asked for anything.</p>'
    return table(("time (UTC)", "after", "stage", "what", "why"), rows, texts=(2, 3, 4))


def _event_row(run: RunReport, event: Mapping[str, Any]) -> list[str]:
    stage = next((stage for stage in run.stages if stage.name == event.get("stage")), None)
    attempt = f"<small>attempt {event['attempt']}</small>" if "attempt" in event else ""
    words = str(event.get("event", "")).replace("stage_attempt_", "attempt ").replace("_", " ")
    why = [str(event[key]) for key in ("reason", "message") if event.get(key)]
    if event.get("event") == "gate_missed":
        why = [f"{event.get('metric')} is {short_number(event.get('value'))}"]
    if event.get("keys"):
        why.append("changed: " + ", ".join(event["keys"]))
    moment = event.get("time")
    after = span(max(0.0, moment - run.started_at)) if moment is not None and run.started_at is not None else ""
    name = f"{stage.number} {escape(stage.name)}{attempt}" if stage else escape(str(event.get("stage", "")))
    return [clock(moment), after, name, escape(words), escape(". ".join(why)) or DASH]


def events_table(run: RunReport) -> str:
    """The recipe and the whole journal, folded away."""
    rows = [_event_row(run, event) for event in run.events[-MOST_EVENTS:]]
    left = f" (the newest {MOST_EVENTS:,} of {len(run.events):,})" if len(run.events) > MOST_EVENTS else ""
    journal = table(("time (UTC)", "after", "stage", "what", "why"), rows, texts=(2, 3, 4))
    return (
        f"<details><summary>recipe.yaml</summary><pre>{escape(run.recipe_text)}</pre></details>"
        f"<details><summary>journal, {len(run.events):,} events{left}</summary>{journal}</details>"
    )


# ---------------------------------------------------------------- words


def answers(run: RunReport) -> str:
    """Cards with held-out pictures and what the last model says; a solid mark is the model's, a dashed one the truth."""
    if not run.answers:
        return ""
    cards = []
    for item in run.answers:
        expected = f'<p class="expected">expected {escape(_short(item.expected))}</p>' if item.expected else ""
        asked = f'<p class="asked-for">{escape(_short(item.question))}</p>' if item.question else ""
        cards.append(
            f'<div class="card {item.verdict}">{item.picture}<div><p class="task">{escape(item.task)}</p>{asked}'
            f'<p class="said">{escape(_short(item.answer)) or "(nothing)"}</p>{expected}</div></div>'
        )
    note = "Answers of the last stage's model to samples that it never trained on. Solid: the model's mark; dashed: the truth."
    return f'<div class="cards">{"".join(cards)}</div><p class="note">{note}</p>'


def examples(run: RunReport) -> str:
    """Responses of RL stages: for each task the first and the newest group's best and worst, so that the change can be read."""
    rows = []
    for stage in run.stages:
        for task in dict.fromkeys(str(entry.get("task")) for entry in stage.examples):
            own = [entry for entry in stage.examples if entry.get("task") == task]
            for entry in dict.fromkeys((0, len(own) - 1)):
                rows.append(_example_row(own[entry], task))
    return table(("task, iteration", "prompt", "best response", "worst response"), rows, texts=(1, 2, 3), kind="said-table")


def _example_row(entry: Mapping[str, Any], task: str) -> list[str]:
    def response(kind: str) -> str:
        found = entry.get(kind) or {}
        return f"<small>reward {short_number(found.get('reward'))}</small>{escape(_short(str(found.get('text', ''))))}"

    prompt = f"{escape(_short(str(entry.get('question', ''))))}<small>{escape(_short(str(entry.get('solution', ''))))}</small>"
    return [f"{escape(task)}<small>{entry.get('iteration')}</small>", prompt, response("best"), response("worst")]


def _short(text: str, most: int = 180) -> str:
    text = re.sub(r"\n\s*\n+", "\n", text)
    return text if len(text) <= most else text[: most - 2].rstrip() + " …"
