"""Running suites: cases in batches to a model, answers judged, scores and every single answer written.

Batches are cut from the list of cases before they are dealt to workers (batch b goes to worker b mod N), so a batch is the
same computation on any number of workers; judging and scoring happen once, over all replies in the suite's order.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from terrace.errors import InputError, TerraceError
from terrace.evaluate.cases import Case
from terrace.evaluate.processes import in_processes
from terrace.evaluate.replies import Reply, Settings
from terrace.evaluate.suites import Reading, Row, Suite, load_suites, tracked_name
from terrace.families.interface import Sight

SCORES_VERSION = 1
Progress = Callable[[str, int, int], None]  # (suite, cases done, cases of this worker)


Answerer = Callable[[Suite, Sequence[Case]], list[Reply]]  # one batch


# ---------------------------------------------------------------- replies, in parts and together


def batches_of_worker(count: int, batch_size: int, worker: int, workers: int) -> list[range]:
    """The places of the cases in each batch that this worker answers."""
    starts = range(worker * batch_size, count, workers * batch_size)
    return [range(start, min(start + batch_size, count)) for start in starts]


def replies_of_worker(
    suite: Suite,
    answerer: Answerer,
    batch_size: int = 16,
    worker: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[int, Reply]:
    """Replies to this worker's share of the cases, by place."""
    batches = batches_of_worker(len(suite.cases), batch_size, worker, workers)
    replies: dict[int, Reply] = {}
    for batch in batches:
        replies.update(zip(batch, answerer(suite, [suite.cases[place] for place in batch]), strict=True))
        if progress is not None:
            progress(suite.label, len(replies), sum(map(len, batches)))
    return replies


def merge_replies(suite: Suite, parts: Sequence[Mapping[int, Reply]]) -> list[Reply]:
    """The replies of all workers in the suite's order. Raises TerraceError if one is missing or came twice."""
    together: dict[int, Reply] = {}
    for part in parts:
        twice = sorted(together.keys() & part.keys())
        if twice:
            raise TerraceError(f"suite {suite.label}: case {suite.cases[twice[0]].id} was answered by two workers")
        together.update(part)
    missing = [place for place in range(len(suite.cases)) if place not in together]
    if missing:
        raise TerraceError(
            f"suite {suite.label}: {len(missing)} of {len(suite.cases)} cases have no answer, the first is "
            f"{suite.cases[missing[0]].id}; run the suite again"
        )
    return [together[place] for place in range(len(suite.cases))]


def judged_rows(suite: Suite, replies: Sequence[Reply], sight: Sight) -> list[Row]:
    """Every case with its answer and verdict."""
    if suite.kind.judge is None:
        verdicts = [(reply.measured, "", None) for reply in replies]
    else:
        judged = suite.kind.judge(suite.cases, [reply.text for reply in replies], sight)
        verdicts = [(verdict.values, verdict.read, verdict.failure) for verdict in judged]
    return [
        Row(
            suite.label, place, case.id, case.group, case.rotation, str(case.metadata.get("category") or ""), case.text,
            reply.text, case.expected if isinstance(case.expected, str) else json.dumps(case.expected), read, values, failure,
            reply.finished, reply.tokens,
        )
        for place, (case, reply, (values, read, failure)) in enumerate(zip(suite.cases, replies, verdicts, strict=True))
    ]  # fmt: skip


def suite_scores(suite: Suite, rows: Sequence[Row], pixels: tuple[int, int] | None = None) -> dict[str, Any]:
    """The suite's entry in scores.json. Cases that nobody could judge are counted and left out of the scores."""
    judged = [row for row in rows if row.failure is None]
    if not judged:
        raise TerraceError(f"suite {suite.label}: no answer could be judged; the first: {rows[0].failure}")
    categories = sorted({row.category for row in judged if row.category})
    groups = {name: [row for row in judged if row.category == name] for name in categories}
    by_category = len(groups) > 1 or suite.kind.name == "loss"  # which is told per kind, be there one or several
    return {
        "kind": suite.kind.name,
        "path": str(suite.path),
        "fingerprint": suite.fingerprint,
        "cases": len(rows),
        "not_judged": len(rows) - len(judged),
        "cut_off": sum(not row.finished for row in rows),  # answers that reached the length limit
        "max_new_tokens": suite.max_new_tokens,
        **({"pixels": list(pixels)} if suite.kind.judge is None and pixels else {}),  # part of a loss' fingerprint
        "scores": _scores(suite, judged),
        "categories": {name: _scores(suite, group) for name, group in groups.items()} if by_category else {},
    }


def _scores(suite: Suite, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    return {name: asdict(statistic.score) for name, statistic in suite.kind.statistics(rows).items()}


# ---------------------------------------------------------------- a model on suites


def evaluate_model(
    model: Path, suites: Sequence[str], out_dir: Path, settings: Settings | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Score a model directory on suites (`kind:path`), write `out_dir` and return what scores.json holds.

    Raises InputError for a directory that is no model, and for a suite that cannot be read, before any weight is loaded.
    """
    settings = settings or Settings()
    started = time.monotonic()
    loaded, sight = open_suites(model, suites, settings)
    measured = [suite.label for suite in loaded if suite.kind.judge is None]
    if settings.engine == "vllm" and measured:
        raise InputError(f"--engine vllm: {', '.join(measured)} measures losses, for which the model itself is needed; use native")
    if settings.workers == 1:
        parts = [worker_replies(model, suites, settings, 0, progress, loaded)]
    else:
        calls = [partial(worker_replies, model, list(suites), settings, worker, None) for worker in range(settings.workers)]
        parts = in_processes(calls, "the evaluation")
    return judge_and_write(model, loaded, parts, sight, out_dir, started)


def judge_and_write(
    model: Path,
    suites: Sequence[Suite],
    parts: Sequence[Mapping[str, Mapping[int, Reply]]],
    sight: Sight,
    out_dir: Path,
    started: float,
) -> dict[str, Any]:
    """Scores from the replies of all workers, written to `out_dir` with every answer. `started`: time.monotonic() seconds."""
    rows = {
        suite.label: judged_rows(suite, merge_replies(suite, [part[suite.label] for part in parts]), sight) for suite in suites
    }
    scores = {
        "version": SCORES_VERSION,
        "model": str(model),
        "pixels": list(sight.pixels),
        "seconds": round(time.monotonic() - started, 3),
        "suites": {suite.label: suite_scores(suite, rows[suite.label], sight.pixels) for suite in suites},
    }
    write_results(out_dir, scores, [row for suite in suites for row in rows[suite.label]])
    return scores


def open_suites(model: Path, suites: Sequence[str], settings: Settings) -> tuple[list[Suite], Sight]:
    """The suites as this model is asked them, and how it sees images."""
    from terrace.evaluate.model_files import model_sight

    sight = model_sight(model)
    if settings.pixels:
        sight = replace(sight, pixels=settings.pixels)
    reading = Reading(sight, settings.images_root, settings.limit, settings.max_new_tokens)
    loaded = load_suites(suites, reading)
    for suite in loaded:
        if sight.family.gives not in suite.kind.gives:
            raise InputError(
                f"suite {suite.label}: it asks a model that gives {' or '.join(suite.kind.gives)}; {sight.family.name} gives"
                f" {sight.family.gives}"
            )
    return loaded, sight


def worker_replies(
    model: Path,
    texts: Sequence[str],
    settings: Settings,
    worker: int,
    progress: Progress | None,
    suites: list[Suite] | None = None,
) -> dict[str, dict[int, Reply]]:
    """Replies of one worker to its share of every suite, by label."""
    from terrace.evaluate.engine import load_model, use_threads_of_worker
    from terrace.evaluate.sample_losses import loss_measure

    device = use_threads_of_worker(worker, settings)
    suites = suites if suites is not None else open_suites(model, texts, settings)[0]
    if all("text" not in suite.kind.gives for suite in suites):
        return _measured_vectors(model, suites, settings, worker, device, progress)
    speaker = load_model(model, device, settings.precision, settings.batch_size, settings.pixels, settings.engine)
    measures = {suite.label: loss_measure(suite.path, speaker) for suite in suites if suite.kind.judge is None}

    def answerer(suite: Suite, cases: Sequence[Case]) -> list[Reply]:
        if suite.label in measures:
            return [Reply("", measured=measured) for measured in measures[suite.label](cases)]
        return speaker.reply(cases, suite.max_new_tokens)

    with closing(speaker.engine):
        return {
            suite.label: replies_of_worker(suite, answerer, settings.batch_size, worker, settings.workers, progress)
            for suite in suites
        }


def _measured_vectors(
    model: Path, suites: Sequence[Suite], settings: Settings, worker: int, device: str | None, progress: Progress | None
) -> dict[str, dict[int, Reply]]:
    """Of a model that gives vectors: figures of this worker's share of every suite."""
    from terrace.evaluate.vectors import load_vector_model, vector_measure

    loaded = load_vector_model(model, device, settings.precision, settings.batch_size, settings.pixels)
    found = {}
    for suite in suites:
        measure = vector_measure(suite.kind.name, suite.cases, loaded)

        def answerer(_: Suite, cases: Sequence[Case], measure: Any = measure) -> list[Reply]:
            return [Reply("", measured=measured) for measured in measure(cases)]

        found[suite.label] = replies_of_worker(suite, answerer, settings.batch_size, worker, settings.workers, progress)
    return found


def write_results(out_dir: Path, scores: dict[str, Any], rows: Sequence[Row]) -> None:
    """`answers.parquet`, and scores.json last, each under its name only when it is complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out_dir.mkdir(parents=True, exist_ok=True)
    columns = {name: [getattr(row, name) for row in rows] for name in Row.__dataclass_fields__ if name != "values"}
    columns["values"] = [json.dumps(row.values) for row in rows]
    partial = out_dir / ".answers.parquet.partial"
    pq.write_table(pa.table(columns), partial, compression="zstd")
    os.replace(partial, out_dir / "answers.parquet")
    partial = out_dir / ".scores.json.partial"
    partial.write_text(json.dumps(scores, indent=1))
    os.replace(partial, out_dir / "scores.json")


def read_results(out_dir: Path) -> tuple[dict[str, Any], list[Row]]:
    """Scores and answers of an earlier evaluation. Raises InputError where there is none, or of another version."""
    import pyarrow.parquet as pq

    try:
        scores = json.loads((out_dir / "scores.json").read_text())
        table = pq.read_table(out_dir / "answers.parquet").to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{out_dir}: no results of `terrace evaluate` in it ({error})") from error
    if scores.get("version") != SCORES_VERSION:
        raise InputError(
            f"{out_dir}: its scores are of version {scores.get('version')}, this program writes {SCORES_VERSION}"
        )
    return scores, [Row(**{**row, "values": json.loads(row["values"])}) for row in table]


def flat_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """`suite/metric` (and `suite/category/metric`) -> value, for gates and MLflow. Categories get names that a metric may have;
    one whose name is taken by then has a `_` more."""
    flat: dict[str, float] = {}
    for label, suite in scores["suites"].items():
        flat.update({f"{label}/{name}": score["value"] for name, score in suite["scores"].items()})
        for category, named in suite["categories"].items():
            head = f"{label}/{tracked_name(category)}"
            while any(f"{head}/{name}" in flat for name in named):
                head += "_"
            flat.update({f"{head}/{name}": score["value"] for name, score in named.items()})
    return flat
