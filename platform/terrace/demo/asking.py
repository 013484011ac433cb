"""Asks a stage's model held-out questions, many at a time, and keeps what it said beside the stage.

The questions are the same after every stage, so that answers stand side by side. They are asked once: `answers.json` in the
stage's folder is read again while it belongs to the same questions and the same result of the stage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.data.images import image_size
from terrace.data.prepare import load_prepared
from terrace.data.prompt import read_prompt
from terrace.data.stream.read import read_sample
from terrace.data.tokenizer import load_tokenizer
from terrace.evaluate.answers import Question, is_right, questions_of
from terrace.evaluate.engine import Model, load_model
from terrace.evaluate.model_files import model_sight
from terrace.families.interface import Sight
from terrace.generation.interface import Prompt, Sampling
from terrace.recipe.schema import Recipe

MOST_TOKENS = 72  # of an answer
SPARE_TOKENS = 12  # that an answer may have more than the right one
TOGETHER = 96  # questions that are decoded at a time
MOST_IMAGES = 4  # of a question: the pages of an album would fill the gallery


@dataclass(frozen=True)
class Asked:
    """One held-out question with the encoded files of its images. `judged`: a rule can tell whether its answer is right."""

    kind: str
    question: Question
    files: list[bytes]
    judged: bool

    @property
    def is_text(self) -> bool:
        """Running text that goes on, not a conversation."""
        return self.question.prompt.messages[0]["role"] == "text"


def held_out_questions(
    recipe: Recipe, run_dir: Path, sight: Sight, kinds: Sequence[str], judged: Collection[str], per_kind: int, shown_per_kind: int
) -> list[Asked]:
    """Up to `per_kind` held-out questions of every kind that is judged, `shown_per_kind` of the others."""
    prepared = load_prepared(run_dir / "data").read_by(sight.family.name)
    asked: list[Asked] = []
    for kind in kinds:
        sources = [name for name, source in recipe.data.sources.items() if source.kind == kind and name in prepared.indexes]
        limit = per_kind if kind in judged else shown_per_kind
        asked += _questions(kind, [prepared.indexes[name] for name in sources], sight, limit, kind in judged)
    return asked


def _questions(kind: str, indexes: list[Any], sight: Sight, limit: int, judged: bool) -> list[Asked]:
    """Up to `limit` held-out questions with the files of their images, one per sample first, then further turns."""
    per_sample: list[list[Asked]] = []
    rows = [(index, int(row)) for index in indexes for row in index.holdout_rows]
    # Neighbouring rows of real collections are much alike: the ones asked are spread over all of them.
    for index, row in _spread(rows, limit):
        sample, files = read_sample(index, row)
        questions = questions_of(sample, [image_size(data) for data in files], sight)
        per_sample.append([Asked(kind, q, [files[k] for k in q.images], judged) for q in questions if len(q.images) <= MOST_IMAGES])
    turns = [turn for place in range(8) for turn in (found[place] for found in per_sample if len(found) > place)]
    return turns[:limit]


def _spread(rows: list[Any], most: int) -> list[Any]:
    """At most `most` of the rows, such that the first few are far apart as well."""
    stride = next((step for step in (7, 11, 13, 17, 19) if len(rows) % step), 1)
    return [rows[place * stride % len(rows)] for place in range(min(most, len(rows)))]


def answers_after(stage_dir: Path, asked: Sequence[Asked]) -> list[str]:
    """What the finished stage's model says to each question, greedily. A few seconds for hundreds of short answers on a CPU."""
    path, mark = stage_dir / "answers.json", _mark(stage_dir, asked)
    if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8"))).get("of") == mark:
        return kept["said"]
    said = _ask(load_model(stage_dir / "final", batch_size=TOGETHER), asked)
    path.write_text(json.dumps({"of": mark, "said": said}, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    return said


def _mark(stage_dir: Path, asked: Sequence[Asked]) -> str:
    """sha256 of the stage's result and of the questions."""
    digest = hashlib.sha256((stage_dir / "result.json").read_bytes())
    for item in asked:
        digest.update(json.dumps([item.question.prompt.id, item.question.text, item.question.expected]).encode())
        for data in item.files:
            digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def _ask(model: Model, asked: Sequence[Asked]) -> list[str]:
    """Answers of one wanted length decode together, and none goes on far beyond it: a judged one is wrong by then."""
    wanted = [len(model.tokenizer.encode(item.question.expected)) + SPARE_TOKENS if item.judged else MOST_TOKENS for item in asked]
    order = sorted(range(len(asked)), key=wanted.__getitem__)
    said = [""] * len(asked)
    for start in range(0, len(order), TOGETHER):
        places = order[start : start + TOGETHER]
        prompts = [_prompt(asked[place], model) for place in places]
        groups = model.engine.generate(prompts, Sampling(1, min(MOST_TOKENS, wanted[places[-1]]), temperature=0.0))
        for place, [response] in zip(places, groups):
            tokens = response.tokens[:-1] if response.finished else response.tokens
            text = _printable(model.tokenizer.decode(tokens.tolist()).strip())
            said[place] = text.split("\n\n")[0] if asked[place].is_text else text  # the paragraph after the picture
    return said


def _printable(text: str) -> str:
    """What a model in its first steps says is not always text: bytes that make no letter become a dot."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\u00b7" for letter in text.replace("\ufffd", "\u00b7"))


def _prompt(item: Asked, model: Model) -> Prompt:
    sizes = [image_size(data) for data in item.files]
    read = read_prompt(item.question.prompt, item.files, sizes, model.tokenizer, model.sight.family, model.sight.pixels)
    return Prompt(**vars(read.inputs), key=(item.question.prompt.id, 0), id=item.question.prompt.id, text=item.question.text)


def scale_of(item: Asked, sight: Sight) -> tuple[int, int]:
    """(width, height) in which the question's coordinates are written."""
    return sight.scale(image_size(item.files[item.question.image]))


def judge(item: Asked, said: str, sight: Sight, whole: bool) -> bool | None:
    """Whether the answer is right; None where no rule can tell."""
    if not item.judged:
        return None
    width, height = scale_of(item, sight) if item.files else (1, 0)
    return is_right(said, item.question, (width**2 + height**2) ** 0.5, whole)


def sight_after(stage_dir: Path) -> Sight:
    """How the finished stage's model sees a picture."""
    sight = model_sight(stage_dir / "final")
    return Sight(load_tokenizer(stage_dir / "final").fit(sight.family), sight.pixels)
