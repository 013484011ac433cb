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

from terrace.data.images import decode_image
from terrace.demo.asking import Asked, answers_after, held_out_questions, judge, scale_of, sight_after
from terrace.evaluate.answers import numbers_in_brackets
from terrace.families.interface import Sight
from terrace.models.build import directory_config, meta_model
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
class Said:
    """What one stage's model said to a question."""

    stage: str
    text: str
    right: bool | None


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
    by_stage: tuple[Said, ...] = ()  # the same question after every stage, the last one's answer included


Scores = dict[str, tuple[int, int]]  # kind -> (right answers, questions asked)


@dataclass(frozen=True)
class Results:
    name: str
    stages: list[StageLosses]
    shown: list[Shown]
    scores: Scores
    parameters: int
    stage_scores: dict[str, Scores] = field(default_factory=dict)  # by stage, in order; the last one's are `scores`

    @property
    def supervised(self) -> list[StageLosses]:
        return [stage for stage in self.stages if not stage.is_rl]

    @property
    def reinforced(self) -> list[StageLosses]:
        return [stage for stage in self.stages if stage.is_rl]

    @property
    def right(self) -> int:
        return sum(right for right, _ in self.scores.values())

    @property
    def asked(self) -> int:
        return sum(asked for _, asked in self.scores.values())


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
    """Asks the model of every finished stage the same held-out questions, of every kind that the recipe trains on.

    Kinds that are not in `judged` are shown, not scored. A worked answer counts where its result is right, or, where
    every kind is judged (drawn scenes have one true wording), where every step is. `progress(done, total)` counts stages.
    """
    stages = read_stages(recipe, run_dir)
    folders = [run_dir / "stages" / f"{number:02d}-{stage.name}" for number, stage in enumerate(stages, start=1)]
    sight, whole = sight_after(folders[-1]), "caption" in judged
    asked = held_out_questions(recipe, run_dir, sight, tuple(TASKS), judged, questions_per_kind, shown_per_kind)
    said: list[list[Said]] = [[] for _ in asked]
    stage_scores: dict[str, Scores] = {}
    for number, (stage, folder) in enumerate(zip(stages, folders), start=1):
        scores = stage_scores.setdefault(stage.name, {})
        for place, text in enumerate(answers_after(folder, asked)):
            kind, right = asked[place].kind, judge(asked[place], text, sight, whole)
            said[place].append(Said(stage.name, text, right))
            if right is not None:
                before = scores.get(kind, (0, 0))
                scores[kind] = (before[0] + right, before[1] + 1)
        if progress:
            progress(number, len(stages))
    chosen = _chosen([(item.kind, answers[-1].right) for item, answers in zip(asked, said)], shown_per_kind)
    shown = [_shown(asked[place], said[place], sight) for place in chosen]
    return Results(recipe.name, stages, shown, stage_scores[stages[-1].name], parameters_of(folders[-1] / "final"), stage_scores)


def _chosen(questions: list[tuple[str, bool | None]], per_kind: int) -> list[int]:
    """Which questions are shown: of each kind right ones first, and a wrong one last where there is one. First one of every kind,
    then the next: a page opens with what the model can do, and hides nothing of what it cannot."""
    by_kind: dict[str, list[int]] = {}
    for kind in dict.fromkeys(kind for kind, _ in questions):
        places = [place for place, (other, _) in enumerate(questions) if other == kind]
        good = [place for place in places if questions[place][1] is not False]
        bad = [place for place in places if questions[place][1] is False]
        first = good[: per_kind - min(1, len(bad))]
        by_kind[kind] = [*first, *bad[: per_kind - len(first)]]
    return [places[turn] for turn in range(per_kind) for places in by_kind.values() if len(places) > turn]


def parameters_of(directory: Path) -> int:
    """Numbers that a model directory's model is made of: what tied layers share counts once."""
    return sum(parameter.numel() for parameter in meta_model(directory_config(directory)).parameters())


def _shown(item: Asked, said: list[Said], sight: Sight) -> Shown:
    question, last = item.question, said[-1]
    if not item.files:
        return Shown(item.kind, None, question.text, last.text, question.expected, last.right, None, None, tuple(said))
    width, height = scale_of(item, sight)
    found = numbers_in_brackets(last.text, len(question.box)) if question.box else None
    return Shown(
        kind=item.kind,
        picture=_picture(item.files[question.image]),
        question=question.text,
        answer=last.text,
        expected=question.expected,
        right=last.right,
        found_mark=_shares(found, width, height),
        expected_mark=_shares(question.box, width, height),
        by_stage=tuple(said),
    )


def _shares(mark: tuple[float, ...] | None, width: int, height: int) -> tuple[float, ...] | None:
    return None if mark is None else tuple(value / (width, height)[axis % 2] for axis, value in enumerate(mark))


def _picture(data: bytes) -> Image.Image:
    picture = Image.fromarray(decode_image(data))
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture
