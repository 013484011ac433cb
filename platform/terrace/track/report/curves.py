"""Which charts the report holds, and how each is read from metrics.jsonl. One or two runs; what was not measured is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from terrace.recipe.schema import PARTS
from terrace.track.report.charts import Facet, Line, Look, Point, chart
from terrace.track.report.numbers import percent, short_number, span
from terrace.track.report.read import Row, RunReport, StageReport

WIDE = Look(width=1080, height=250, scale="log", zero=False, empty="see per task")
HALF = Look()
THIRD = Look(width=350, height=150)
TASK_FIGURES = (  # key in `tasks`, title, note, how a value is written
    ("reward", "reward", "mean over responses", short_number),
    ("pass_rate", "pass rate", "responses that pass", percent),
    ("zero_variance", "groups without a difference", "nothing to learn", percent),
    ("response_tokens", "response length", "tokens", short_number),
    ("truncated", "cut responses", "reached max_response_tokens", percent),
    ("distinct", "distinct responses", "within a group", percent),
    ("entropy", "entropy", "nats per token", short_number),
    ("reward_failures", "failed rewards", "counted apart, never as 0", percent),
)
POLICY_FIGURES = (
    ("loss", "policy loss", "its value says little; its gradient trains", short_number),
    ("kl", "KL to the start", "nats per token", short_number),
    ("logprob_mismatch_mean", "rollout against trainer", "mean difference of log-probabilities", short_number),
    ("clipped", "clipped ratios", "share of tokens", percent),
    ("groups_drawn", "groups drawn", "per iteration", short_number),
    ("groups_kept", "groups kept", "per iteration", short_number),
    ("easy_pool", "easy pool", "prompts solved and set aside", short_number),
    ("rollout_seconds", "rollout", "seconds per iteration", span),
    ("reward_seconds", "rewards", "seconds per iteration", span),
    ("update_seconds", "update", "seconds per step", span),
)


class Curves:
    """Charts over the stages of `runs` (one or two); `names` are the runs' labels, '' for a single run."""

    def __init__(self, runs: Sequence[RunReport], names: Sequence[str]):
        self.runs, self.names = runs, names
        self.stages = [name for name in dict.fromkeys(stage.name for run in runs for stage in run.stages) if self._rows_of(name)]
        self.by_name = [{stage.name: stage for stage in run.stages} for run in runs]

    def training(self) -> str:
        wide = self.over_steps("Training loss", "mean over supervised tokens, logarithmic", _loss, WIDE)
        halves = [
            self.over_steps("Gradient norm", "before clipping, logarithmic", _gradient_norm, _log(HALF)),
            self.over_steps("Visual tokens", "per step", lambda row, _: row.get("visual_tokens"), HALF),
        ]
        rates = [self.over_steps(f"Learning rate, {part}", "", _rate(part), replace(THIRD, smooth=False, empty="frozen")) for part in PARTS]
        return wide + grid(rates, 3) + grid(halves, 2)

    def throughput(self) -> str:
        share = Look(unit=percent)
        return grid(
            [
                self.over_steps("Tokens per second", "", lambda row, _: row.get("tokens_per_second"), HALF),
                self.over_steps("Waiting for data", "share of the step", _wait, share),
                self.over_steps("Fill", "tokens / (packs × sequence length)", lambda row, _: row.get("pack_fill"), share),
                self.over_steps("Step", "seconds", lambda row, _: row.get("step_seconds"), Look(unit=span)),
                self.over_steps("Imbalance", "largest cost of a worker / mean", _imbalance, Look(zero=False)),
            ],
            2,
        )

    def held_out(self) -> str:
        """One small chart per kind: before and after each stage, and every N steps where the recipe asks for it."""
        kinds = dict.fromkeys(kind for run in self.runs for stage in run.stages for _, losses in evaluations(stage) for kind in losses)
        rising = replace(THIRD, smooth=False, dots=True)
        falling = replace(rising, scale="log", zero=False)
        charts = []
        for kind in kinds:
            points, better_high = _held_out_points(kind), is_better_high(kind)
            # A loss belongs to the whole curriculum; rewards would be a speck at its end.
            names = [name for name in self.stages if not better_high or any(stage and points(stage) for stage in self._each(name))]
            charts.append(self._draw(kind, "", names, points, rising if better_high else falling, marks=False))
        return grid(charts, 3)

    def tasks(self) -> str:
        """MORL: every figure of every task over the iterations, then the figures of the policy step."""
        names = [name for name in self.stages if any(stage and _has(stage, "tasks") for stage in self._each(name))]
        if not names:
            return ""
        rows = [row for name in names for stage in self._each(name) if stage for row in stage.rows]
        parts = []
        for task in sorted({task for row in rows for task in row.get("tasks") or {}}):
            charts = [
                self._draw(title, note, names, _task_points(task, key), replace(THIRD, unit=unit), marks=False, steps=_iterations)
                for key, title, note, unit in TASK_FIGURES
            ]
            parts.append(f"<h3>{escape(task)}</h3>{grid(charts, 3)}")
        charts = [
            self._draw(title, note, names, _field_points(key), replace(THIRD, unit=unit), marks=False)
            for key, title, note, unit in POLICY_FIGURES
        ]
        return "".join(parts) + "<h3>policy step</h3>" + grid(charts, 3)

    def over_steps(self, title: str, note: str, value: Callable[[Row, StageReport], Any], look: Look) -> str:
        """`value` gives None where a row has nothing, and NaN for what was not finite: the chart marks it."""

        def points(stage: StageReport) -> list[Point]:
            found = [(row["step"], value(row, stage)) for row in stage.rows]
            return [(step, number) for step, number in found if number is not None]

        return self._draw(title, note, self.stages, points, look)

    def _draw(
        self, title: str, note: str, names: Sequence[str], points: Callable[[StageReport], list[Point]], look: Look,
        marks: bool = True, steps: Callable[[StageReport], float] | None = None,
    ) -> str:  # fmt: skip
        measure = steps or (lambda stage: max(stage.steps, (stage.result or {}).get("steps", 0)))
        facets = [
            Facet(number, name, max([measure(stage) for stage in self._each(name) if stage] or [1]))
            for number, name in ((self._number(name), name) for name in names)
        ]
        lines = [
            Line(label, [points(stages[name]) if name in stages else [] for name in names])
            for label, stages in zip(self.names, self.by_name)
        ]
        # Two runs' marks on one chart could not be told apart; the timelines beside each other show both.
        resumes = []
        if marks and len(self.runs) == 1:
            own = [(place, self.by_name[0][name]) for place, name in enumerate(names)]
            resumes = [(place, attempt.first_step) for place, stage in own for attempt in stage.attempts if attempt.first_step]
        return chart(title, note, facets, lines, look, resumes)

    def _each(self, name: str) -> list[StageReport | None]:
        return [stages.get(name) for stages in self.by_name]

    def _rows_of(self, name: str) -> bool:
        return any(stage.rows or stage.result for run in self.runs for stage in run.stages if stage.name == name)

    def _number(self, name: str) -> int:
        return next(stage.number for stage in self._each(name) if stage)


def evaluations(stage: StageReport) -> list[tuple[int, dict[str, float]]]:
    """(step, figure per kind): before the stage, every N steps, and after it."""
    result = (stage.result or {}).get("evaluation") or {}
    found = [(0, result["before"])] if result.get("before") else []
    found += [(row["step"], row["evaluation"]) for row in stage.rows if row.get("evaluation")]
    return found + ([(stage.result["steps"], result["after"])] if stage.result and result.get("after") else [])


def is_better_high(kind: str) -> bool:
    """Rewards and accuracies rise when a model gets better; losses fall."""
    return "reward/" in kind or any(word in kind for word in ("accuracy", "/iou", "exact"))


def grid(charts: Sequence[str], columns: int) -> str:
    drawn = [one for one in charts if one]
    return f'<div class="grid g{columns}">{"".join(drawn)}</div>' if drawn else ""


def shares(run: RunReport) -> str:
    """A table: of each source, the share of the samples seen per stage, as a bar, beside what the mixture asks for."""
    stages = [stage for stage in run.stages if stage.rows]
    sources = [name for name in run.recipe.data.sources if any(name in stage.stage.mixture.weights for stage in stages)]
    if not sources:
        return ""
    head = "".join(f"<th>{stage.number} {escape(stage.name)}</th>" for stage in stages)
    counts = {stage.name: {name: _seen(stage, name) for name in sources} for stage in stages}
    rows = []
    for name in sources:
        cells = "".join(_share_cell(stage, name, counts[stage.name]) for stage in stages)
        rows.append(f"<tr><td>{escape(name)}<small>{escape(run.recipe.data.sources[name].kind)}</small></td>{cells}</tr>")
    return f'<div class="panel"><table class="shares"><tr><th>source</th>{head}</tr>{"".join(rows)}</table></div>'


def _share_cell(stage: StageReport, source: str, counts: dict[str, int]) -> str:
    if source not in stage.stage.mixture.weights:
        return '<td class="none">–</td>'
    share = counts[source] / max(1, sum(counts.values()))
    planned = ((stage.plan or {}).get("sources") or {}).get(source) or {}
    wanted = planned.get("share_of_samples")
    mark = "" if wanted is None else f'<u style="left:{100 * wanted:.1f}%"></u>'
    asked = "" if wanted is None else f" · asked {percent(wanted)}"
    return (
        f"<td><b>{percent(share)}</b><small>{counts[source]:,}{asked}</small>"
        f'<span class="meter"><i style="width:{100 * share:.1f}%"></i>{mark}</span></td>'
    )


def _seen(stage: StageReport, source: str) -> int:
    return sum((row.get("samples_per_source") or {}).get(source, 0) for row in stage.rows)


# ---------------------------------------------------------------- reading a row


def _log(look: Look) -> Look:
    return replace(look, scale="log", zero=False)


def _loss(row: Row, stage: StageReport) -> float | None:
    """On-policy losses are about zero and change their sign: they have their own chart, without a logarithm."""
    return None if stage.stage.objective == "grpo" else _or_not_finite(row, "loss")


def _gradient_norm(row: Row, _: StageReport) -> float | None:
    return _or_not_finite(row, "grad_norm")


def _or_not_finite(row: Row, key: str) -> float | None:
    """A skipped step has no number because it was not finite."""
    return math.nan if row.get(key) is None and row.get("skipped") else row.get(key)


def _rate(part: str) -> Callable[[Row, StageReport], float | None]:
    return lambda row, _: (row.get("learning_rate") or {}).get(part) or None


def _wait(row: Row, _: StageReport) -> float | None:
    seconds, waited = row.get("step_seconds"), row.get("data_wait_seconds")
    return None if not seconds or waited is None else waited / seconds


def _imbalance(row: Row, stage: StageReport) -> float | None:
    workers = stage.stage.resources.workers
    return row.get("max_over_mean_cost") if workers != 1 else None


def _has(stage: StageReport, key: str) -> bool:
    return any(key in row for row in stage.rows)


def _iterations(stage: StageReport) -> float:
    return max((row.get("iteration", 0) for row in stage.rows), default=0)


def _held_out_points(kind: str) -> Callable[[StageReport], list[Point]]:
    return lambda stage: [(step, losses[kind]) for step, losses in evaluations(stage) if kind in losses]


def _task_points(task: str, key: str) -> Callable[[StageReport], list[Point]]:
    return lambda stage: [
        (row["iteration"], figures[key])
        for row in stage.rows
        if (figures := (row.get("tasks") or {}).get(task)) and figures.get(key) is not None
    ]


def _field_points(key: str) -> Callable[[StageReport], list[Point]]:
    return lambda stage: [(row["step"], row[key]) for row in stage.rows if isinstance(row.get(key), int | float)]
