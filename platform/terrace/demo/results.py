"""Collects what a finished demo has learned: losses per stage, answers to held-out questions, and how many are right.

Everything is read from the run directory, so that a finished run can be shown again without training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from terrace.data.images import decode_image, image_size
from terrace.data.prepare import load_prepared
from terrace.data.stream.read import read_sample
from terrace.evaluate.answers import Question, is_right, numbers_in_brackets, questions_of
from terrace.evaluate.generate import Speaker, answer, load_speaker
from terrace.recipe.schema import Recipe

TASKS = {  # how the kinds of samples are called on the page, in the order they are shown
    "caption": "Describing",
    "grounding": "Pointing with a box",
    "counting": "Counting",
    "qa": "Answering",
    "ocr": "Reading",
    "chart": "Reading charts",
    "gui": "Clicking",
    "reasoning": "Reasoning",
    "instruction": "Following",
    "document": "Continuing a book",
}
RL_TASKS = {"counting": "Counting", "grounding": "Pointing with a box", "visual_reasoning": "Adding up"}
EXACT = frozenset({"grounding", "gui", "qa", "counting", "chart", "reasoning"})  # answers that a rule can judge in any data
PICTURE_SIDE = 448  # pixels of the longer side of a picture that goes into the gallery


@dataclass(frozen=True)
class StageLosses:
    """Held-out loss per kind (of an RL stage: mean reward per task) before and after one stage, and its training curve."""

    name: str
    before: dict[str, float]
    after: dict[str, float]
    steps: int
    seconds: float
    tokens: int
    curve: list[float]  # training loss of each step; empty for an RL stage, whose loss says nothing
    rewards: dict[str, list[float]] = field(default_factory=dict)  # of an RL stage: mean reward per task and iteration
    greedy: dict[str, tuple[float, float]] = field(default_factory=dict)  # of an RL stage: before and after, of greedy answers

    @property
    def is_rl(self) -> bool:
        return bool(self.rewards)


@dataclass(frozen=True)
class Shown:
    """One held-out question with the model's answer, ready to be drawn."""

    kind: str
    picture: Image.Image | None
    question: str
    answer: str
    expected: str
    right: bool | None  # None: free text that no rule can judge
    found_mark: tuple[float, ...] | None  # box or point of the answer, as shares (0 to 1) of the picture's width and height
    expected_mark: tuple[float, ...] | None


@dataclass(frozen=True)
class Results:
    name: str
    stages: list[StageLosses]
    shown: list[Shown]
    scores: dict[str, tuple[int, int]]  # kind -> (right answers, questions asked)
    parameters: int

    @property
    def supervised(self) -> list[StageLosses]:
        return [stage for stage in self.stages if not stage.is_rl]

    @property
    def reinforced(self) -> list[StageLosses]:
        return [stage for stage in self.stages if stage.is_rl]


def read_stages(recipe: Recipe, run_dir: Path) -> list[StageLosses]:
    """The losses, or rewards, of every finished stage, in order."""
    stages = []
    for number, stage in enumerate(recipe.stages, start=1):
        folder = run_dir / "stages" / f"{number:02d}-{stage.name}"
        if not (folder / "result.json").is_file():
            break
        result = json.loads((folder / "result.json").read_text())
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        is_rl = stage.objective == "grpo"
        evaluation = result["evaluation"]
        before, after = (_by_kind(evaluation[when]) for when in ("before", "after"))
        curve = [] if is_rl else [row["loss"] for row in rows]
        rewards = rewards_per_task(rows) if is_rl else {}
        greedy = {
            task: (evaluation["before"][name], evaluation["after"][name])
            for task in rewards
            if (name := f"greedy_reward/{task}") in evaluation["after"]
        }
        facts = (result["steps"], result["seconds"], result["tokens"])
        stages.append(StageLosses(stage.name, before, after, *facts, curve, rewards, greedy))
    return stages


def _by_kind(figures: dict[str, float]) -> dict[str, float]:
    """Held-out figures by kind of sample or task: an RL stage's `reward/<task>` is that of sampled answers."""
    return {name.removeprefix("reward/"): value for name, value in figures.items() if not name.startswith("greedy_reward/")}


def rewards_per_task(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean training reward of every task over the iterations in which it was drawn."""
    curves: dict[str, list[float]] = {}
    for row in rows:
        for task, figures in (row.get("tasks") or {}).items():
            curves.setdefault(task, []).append(figures["reward"])
    return curves


def collect(
    recipe: Recipe, run_dir: Path, judged: Collection[str] = tuple(TASKS), questions_per_kind: int = 40,
    shown_per_kind: int = 3, progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Asks the last stage's model held-out questions of every kind it trained on. About 60 ms per short answer on a CPU.

    Kinds that are not in `judged` are shown, not scored. A worked answer counts where its result is right, or, where
    every kind is judged (drawn scenes have one true wording), where every step is.
    """
    stages = read_stages(recipe, run_dir)
    final = run_dir / "stages" / f"{len(stages):02d}-{stages[-1].name}" / "final"
    speaker = load_speaker(final)
    prepared = load_prepared(run_dir / "data").read_by(speaker.sight.family.name)
    asked: list[tuple[str, Question, list[bytes]]] = []
    for kind in TASKS:
        sources = [name for name, source in recipe.data.sources.items() if source.kind == kind and name in prepared.indexes]
        limit = questions_per_kind if kind in judged else shown_per_kind
        asked += _questions(kind, [prepared.indexes[name] for name in sources], speaker, limit)
    whole = "caption" in judged
    scores: dict[str, tuple[int, int]] = {}
    shown: list[Shown] = []
    for place, (kind, question, files) in enumerate(asked):
        item = _ask(kind, question, files, speaker, kind in judged, whole)
        if item.right is not None:
            right, total = scores.get(kind, (0, 0))
            scores[kind] = (right + item.right, total + 1)
        if sum(other.kind == kind for other in shown) < shown_per_kind:
            shown.append(item)
        if progress:
            progress(place + 1, len(asked))
    return Results(recipe.name, stages, shown, scores, sum(p.numel() for p in speaker.model.parameters()))


def _questions(kind: str, indexes: list[Any], speaker: Speaker, limit: int) -> list[tuple[str, Question, list[bytes]]]:
    """Up to `limit` held-out questions with the files of their images, one per sample first, then further turns."""
    per_sample: list[list[tuple[str, Question, list[bytes]]]] = []
    rows = [(index, int(row)) for index in indexes for row in index.holdout_rows]
    # Neighbouring rows of real collections are much alike: the ones asked are spread over all of them.
    for index, row in _spread(rows, limit):
        sample, files = read_sample(index, row)
        sizes = [image_size(data) for data in files]
        questions = questions_of(sample, sizes, speaker.sight)
        per_sample.append([(kind, q, [files[k] for k in q.images]) for q in questions if len(q.images) <= 4])
    turns = [turn for place in range(8) for turn in (found[place] for found in per_sample if len(found) > place)]
    return turns[:limit]


def _spread(rows: list[Any], most: int) -> list[Any]:
    """At most `most` of the rows, such that the first few are far apart as well."""
    stride = next((step for step in (7, 11, 13, 17, 19) if len(rows) % step), 1)
    return [rows[place * stride % len(rows)] for place in range(min(most, len(rows)))]


def _ask(kind: str, question: Question, files: list[bytes], speaker: Speaker, judged: bool, whole: bool) -> Shown:
    said = answer(speaker, question.prompt, files, max_new_tokens=72).text
    if question.prompt.messages[0]["role"] == "text":
        said = said.split("\n\n")[0]  # the paragraph after the picture
    if not files:
        right = is_right(said, question, 1.0, whole) if judged else None
        return Shown(kind, None, question.text, said, question.expected, right, None, None)
    width, height = image_size(files[question.image])
    new_width, new_height = speaker.sight.scale((width, height))
    diagonal = (new_width**2 + new_height**2) ** 0.5
    found = numbers_in_brackets(said, len(question.box)) if question.box else None
    return Shown(
        kind=kind,
        picture=_picture(files[question.image]),
        question=question.text,
        answer=said,
        expected=question.expected,
        right=is_right(said, question, diagonal, whole) if judged else None,
        found_mark=_shares(found, new_width, new_height),
        expected_mark=_shares(question.box, new_width, new_height),
    )


def _shares(mark: tuple[float, ...] | None, width: int, height: int) -> tuple[float, ...] | None:
    return None if mark is None else tuple(value / (width, height)[axis % 2] for axis, value in enumerate(mark))


def _picture(data: bytes) -> Image.Image:
    picture = Image.fromarray(decode_image(data))
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture
