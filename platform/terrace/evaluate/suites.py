"""The kinds of suites: how each reads its cases, judges an answer, and makes scores of the verdicts.

A suite is named `kind:path`. Its fingerprint covers the questions, pictures and expected answers in order, the kind's
version and the answer's length limit; two runs compare only where fingerprints are equal. Raise a kind's `version` when
its prompt or its judgement changes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.evaluate import cases as rows_of
from terrace.evaluate import metrics
from terrace.evaluate.cases import Case
from terrace.evaluate.metrics import Statistic
from terrace.evaluate.multiple_choice import chosen_letter, circular_right, plain_right, read_choice_cases
from terrace.evaluate.sample_losses import held_out_cases
from terrace.families.interface import Sight
from terrace.rewards.sandbox import SandboxPool
from terrace.rewards.types import RewardItem


@dataclass(frozen=True)
class Reading:
    """What reading a suite depends on besides its path."""

    sight: Sight  # how the model sees images
    images_root: Path | None = None
    limit: int | None = None  # cases (questions of multiple choice, samples of a held-out source) at most
    max_new_tokens: int | None = None  # instead of the kind's own


@dataclass(frozen=True)
class Verdict:
    """What one answer is worth. `failure` says why nobody could judge it; such a case is counted and left out."""

    values: dict[str, float]
    read: str = ""  # what was taken as the answer
    failure: str | None = None


@dataclass(frozen=True)
class Row:
    """One case with its answer and verdict, as kept in answers.parquet."""

    suite: str
    place: int
    id: str
    group: str
    rotation: int
    category: str
    prompt: str
    answer: str
    expected: str
    read: str
    values: dict[str, float]
    failure: str | None = None
    finished: bool = True  # the model ended by itself, within the limit
    answer_tokens: int = 0


Judge = Callable[[Sequence[Case], Sequence[str], tuple[int, int]], list[Verdict]]


@dataclass(frozen=True)
class SuiteKind:
    name: str
    what: str
    read: Callable[[Path, Reading], list[Case]]
    judge: Judge | None  # None: nothing is generated, figures are measured
    statistics: Callable[[Sequence[Row]], dict[str, Statistic]]
    max_new_tokens: int
    version: int = 2
    gives: tuple[str, ...] = ("text",)  # what a model must give (`families.interface.Family.gives`) to be asked


@dataclass(frozen=True)
class Suite:
    label: str  # kind:name of the file, unique in a run
    kind: SuiteKind
    path: Path
    cases: list[Case]
    max_new_tokens: int
    fingerprint: str = field(repr=False)


# ---------------------------------------------------------------- judging


def model_pixels(case: Case, sight: Sight) -> dict[str, Any]:
    """Metadata that the rules need: the sizes of the images as stored and as the model sees them."""
    sizes = {
        "image_sizes": [list(size) for size in case.sizes],
        "model_sizes": [list(sight.scale(size)) for size in case.sizes],
    }
    return {**case.metadata, **sizes}


def _judge_box(cases: Sequence[Case], answers: Sequence[str], sight: Sight) -> list[Verdict]:
    verdicts = []
    for case, answer in zip(cases, answers):
        iou = metrics.box_iou(answer, case.expected, model_pixels(case, sight))
        values = {f"accuracy@{metrics.RIGHT_IOU}": float(iou >= metrics.RIGHT_IOU), "mean_iou": iou}
        verdicts.append(Verdict(values, metrics.numbers_read(answer)))
    return verdicts


def _judge_point(cases: Sequence[Case], answers: Sequence[str], sight: Sight) -> list[Verdict]:
    return [
        Verdict(
            {"accuracy": metrics.point_in_box(answer, case.expected, model_pixels(case, sight))},
            metrics.numbers_read(answer),
        )
        for case, answer in zip(cases, answers)
    ]


def _judge_choice(cases: Sequence[Case], answers: Sequence[str], sight: Sight) -> list[Verdict]:
    letters = [chosen_letter(answer, case.metadata["choices"]) for case, answer in zip(cases, answers)]
    return [Verdict({"right": float(letter == case.expected)}, letter or "") for case, letter in zip(cases, letters)]


def _judge_text(values: Callable[[str, Any], dict[str, float]], read: Callable[[str], str] = str.strip) -> Judge:
    """Verdicts of figures of (answer, expected text or accepted texts)."""

    def judge(cases: Sequence[Case], answers: Sequence[str], sight: Sight) -> list[Verdict]:
        return [Verdict(values(answer, case.expected), read(answer)) for case, answer in zip(cases, answers)]

    return judge


def _judge_caption(cases: Sequence[Case], answers: Sequence[str], sight: Sight) -> list[Verdict]:
    values = [metrics.caption_values(answer, case.expected) for case, answer in zip(cases, answers)]
    return [Verdict(value, answer.strip()) for value, answer in zip(values, answers)]


def _judge_reasoning(cases: Sequence[Case], answers: Sequence[str], sight: Sight) -> list[Verdict]:
    """The rewards' rule in its killable processes: an expression may take for ever to simplify."""
    items = [RewardItem(case.text, answer, case.expected, case.metadata) for case, answer in zip(cases, answers)]
    with SandboxPool(workers=min(2, -(-len(items) // 16) or 1)) as pool:
        outcomes = pool.judge("text_reasoning", items)
    return [
        Verdict({} if one.value is None else {"accuracy": one.value}, metrics.answer_read(answer), one.failure)
        for one, answer in zip(outcomes, answers)
    ]


def _ocr_values(answer: str, expected: Any) -> dict[str, float]:
    return {
        "exact": metrics.exact_text(answer, expected),
        "edit_distance": metrics.edit_distance_share(answer, expected),
        "anls": metrics.anls(answer, expected),
    }


# ---------------------------------------------------------------- scoring


def _shares(*names: str) -> Callable[[Sequence[Row]], dict[str, Statistic]]:
    """Shares of right cases."""
    return lambda rows: {name: metrics.share([row.values[name] for row in rows]) for name in names}


def _box_statistics(rows: Sequence[Row]) -> dict[str, Statistic]:
    right = f"accuracy@{metrics.RIGHT_IOU}"
    return {**_shares(right)(rows), "mean_iou": metrics.mean([row.values["mean_iou"] for row in rows])}


def _ocr_statistics(rows: Sequence[Row]) -> dict[str, Statistic]:
    means = {name: metrics.mean([row.values[name] for row in rows]) for name in ("edit_distance", "anls")}
    return {**_shares("exact")(rows), **means}


def _choice_statistics(rows: Sequence[Row]) -> dict[str, Statistic]:
    results = [(row.group, row.rotation, row.values["right"] == 1.0) for row in rows]
    return {
        "circular_accuracy": metrics.share(list(map(float, circular_right(results).values()))),
        "accuracy": metrics.share(list(map(float, plain_right(results).values()))),
    }


def _caption_statistics(rows: Sequence[Row]) -> dict[str, Statistic]:
    values = [row.values for row in rows]
    return {"chrf": metrics.mean([value["chrf"] for value in values]), "bleu": metrics.corpus_bleu(values)}


def _loss_statistics(rows: Sequence[Row]) -> dict[str, Statistic]:
    return {"loss": metrics.ratio([row.values["loss_sum"] for row in rows], [row.values["tokens"] for row in rows])}


# ---------------------------------------------------------------- the kinds


def _rows(expected: rows_of.Expected) -> Callable[[Path, Reading], list[Case]]:
    return lambda path, reading: rows_of.read_cases(path, expected, reading.images_root, reading.limit)


KINDS: dict[str, SuiteKind] = {
    kind.name: kind
    for kind in (
        SuiteKind(
            "mmbench", "multiple choice, MMBench's TSV: plain and CircularEval",
            lambda path, reading: read_choice_cases(path, reading.limit, reading.images_root),
            _judge_choice, _choice_statistics, 32,
        ),
        SuiteKind("grounding", "one box per question", _rows(rows_of.expected_box), _judge_box, _box_statistics, 64),
        SuiteKind("gui", "one point that must lie in a box", _rows(rows_of.expected_box), _judge_point, _shares("accuracy"), 64),
        SuiteKind(
            "counting", "how many", _rows(rows_of.expected_count),
            _judge_text(lambda a, e: {"accuracy": metrics.exact_count(a, e)}, metrics.answer_read), _shares("accuracy"), 32,
        ),
        SuiteKind(
            "ocr", "the text in a picture", _rows(rows_of.expected_text), _judge_text(_ocr_values), _ocr_statistics, 512,
        ),
        SuiteKind(
            "chart", "charts and figures, numbers within 5 %", _rows(rows_of.expected_text),
            _judge_text(lambda a, e: {"relaxed_accuracy": metrics.relaxed_match(a, e)}, metrics.answer_read),
            _shares("relaxed_accuracy"), 64,
        ),
        SuiteKind(
            "caption", "captions, chrF and BLEU of sacrebleu", _rows(rows_of.expected_text),
            _judge_caption, _caption_statistics, 128,
        ),
        SuiteKind(
            "reasoning", "mathematical answers, judged as RL rewards them", _rows(rows_of.expected_result), _judge_reasoning,
            _shares("accuracy"), 512,
        ),
        SuiteKind(
            "loss", "loss per kind on the held-out samples of prepared data",
            lambda path, reading: held_out_cases(path, reading.sight, reading.limit), None, _loss_statistics, 0,
        ),
        SuiteKind(
            "zero_shot", "pictures and the class of each: two towers choose among the classes by `a photo of a CLASS.`",
            _rows(rows_of.expected_text), None, _shares("accuracy", "accuracy_of_5"), 0, gives=("vectors",),
        ),
        SuiteKind(
            "retrieval", "pictures and their captions: recall at 1, 5 and 10 both ways", _rows(rows_of.expected_text), None,
            _shares(*(f"{way}_r{place}" for way in ("image_to_text", "text_to_image") for place in (1, 5, 10))), 0, gives=("vectors",),
        ),
        SuiteKind(
            "knn", "pictures and the class of each: the 20 nearest others vote, by the encoder's features",
            _rows(rows_of.expected_text), None, _shares("accuracy"), 0, gives=("vectors", "pictures"),
        ),
        SuiteKind(
            "probe", "pictures and the class of each: a linear map of the encoder's features, fitted on four fifths",
            _rows(rows_of.expected_text), None, _shares("accuracy"), 0, gives=("vectors", "pictures"),
        ),
    )
}  # fmt: skip


def parse_suite(text: str) -> tuple[SuiteKind, Path]:
    """`kind:path`. Raises InputError for another form, an unknown kind, or a path where nothing is."""
    name, colon, path = text.partition(":")
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"kinds are {', '.join(KINDS)}"
        raise InputError(f"suite {text!r}: there is no kind {name!r}; {hint}")
    if not colon or not path:
        raise InputError(f"suite {text!r}: name its file as {name}:PATH")
    if not Path(path).exists():
        raise InputError(f"suite {text}: {path} does not exist")
    return KINDS[name], Path(path)


def tracked_name(name: str) -> str:
    """`name` as metrics may be called (letters, digits, `_`, `-`, `.`, space; MLflow refuses all else, and reads `/` and `:` as
    parts of a path): other characters become `_`. Different names may become the same, which `load_suites` refuses."""
    return re.sub(r"[^\w.\- ]", "_", name, flags=re.ASCII).strip(" .") or "_"


def load_suites(texts: Sequence[str], reading: Reading) -> list[Suite]:
    """The suites with all their cases. Raises InputError naming file and row, before any model is loaded."""
    suites: list[Suite] = []
    for text in texts:
        kind, path = parse_suite(text)
        label = f"{kind.name}:{tracked_name(path.resolve().stem)}"
        if label in {suite.label for suite in suites}:
            raise InputError(f"suite {text}: another suite is {label} too; run it by itself, or rename the file")
        cases = kind.read(path, reading)
        tokens = kind.max_new_tokens if reading.max_new_tokens is None or not kind.judge else reading.max_new_tokens
        suites.append(Suite(label, kind, path, cases, tokens, fingerprint(kind, cases, tokens)))
    return suites


def fingerprint(kind: SuiteKind, cases: Sequence[Case], max_new_tokens: int) -> str:
    """sha256 of everything that makes a suite this suite."""
    value = [kind.name, kind.version, max_new_tokens, [case.digest for case in cases]]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
