"""Predictions, questions and the model in the files that VLMEvalKit reads, so that its own scripts can score them.

Three files per multiple-choice suite, for `python run.py --config CONFIG --mode eval` of VLMEvalKit with
`PRED_FORMAT=tsv` (its default, xlsx, would need a spreadsheet library here and says nothing more):

- `LMUData/SUITE.tsv`: the questions with every rotation as a row of its own, numbered as MMBench does; rotated rows name
  the row that has the picture.
- `MODEL/MODEL_SUITE.tsv`: the same rows with a `prediction` column.
- `config.json`: the model directory under its class, and the data set under `ImageMCQDataset`.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.evaluate.choice_file import read_questions
from terrace.evaluate.choice_question import ROTATION_STEP, ChoiceQuestion, rotations
from terrace.evaluate.suites import Row

MODEL_CLASS = "Qwen2VLChat"  # VLMEvalKit's name for both Qwen2-VL and Qwen2.5-VL directories


def write_vlmevalkit(out_dir: Path, model: Path, name: str, scores: dict[str, Any], rows: Sequence[Row]) -> list[Path]:
    """Write the files of every multiple-choice suite; returns them. `name` is the model's in file names."""
    labels = [label for label, suite in scores["suites"].items() if suite["kind"] == "mmbench"]
    if not labels:
        raise InputError("--vlmevalkit writes multiple-choice suites (mmbench:FILE); none was run")
    written, data = [], {}
    for label in labels:
        asked = [row for row in rows if row.suite == label]
        dataset = label.partition(":")[2]
        groups = {row.group for row in asked}
        path = Path(scores["suites"][label]["path"])
        questions = [one for one in read_questions(path) if str(one.index) in groups]
        answers = {row.id: row.answer for row in asked}
        written.append(_write_tsv(out_dir / "LMUData" / f"{dataset}.tsv", question_rows(questions)))
        written.append(_write_tsv(out_dir / name / f"{name}_{dataset}.tsv", prediction_rows(questions, answers)))
        data[dataset] = {"class": "ImageMCQDataset", "dataset": dataset}
    low, high = scores["pixels"]
    entry = {"class": MODEL_CLASS, "model_path": str(model.resolve()), "min_pixels": low, "max_pixels": high}
    config = out_dir / "config.json"
    config.write_text(json.dumps({"model": {name: entry}, "data": data}, indent=1))
    return [*written, config]


def question_rows(questions: Sequence[ChoiceQuestion]) -> list[dict[str, str]]:
    """Rows of the data set, the pictures with rotation 0."""
    found = []
    for question in questions:
        pictures = [base64.b64encode(data).decode() for data in question.images]
        picture = str(pictures) if len(pictures) > 1 else "".join(pictures)
        for rotation, asked in enumerate(rotations(question)):
            image = picture if rotation == 0 or not picture else str(question.index)
            found.append({**_fields(asked, rotation), "image": image})
    return found


def prediction_rows(questions: Sequence[ChoiceQuestion], answers: dict[str, str]) -> list[dict[str, str]]:
    """The same rows with the model's answer. Raises InputError for a row without one."""
    found = []
    for question in questions:
        for rotation, asked in enumerate(rotations(question)):
            fields = _fields(asked, rotation)
            if fields["index"] not in answers:
                raise InputError(f"question {fields['index']} has no answer; the file is not the one that was run")
            found.append({**fields, "prediction": answers[fields["index"]]})
    return found


def _fields(question: ChoiceQuestion, rotation: int) -> dict[str, str]:
    fields = {
        "index": str(rotation * ROTATION_STEP + question.index), "g_index": str(question.index),
        "question": question.question, "hint": question.hint, **question.letters,
    }  # fmt: skip
    return {**fields, "answer": question.right_letter, "category": question.category}


def _write_tsv(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Quoted like VLMEvalKit's own files; a question with fewer choices leaves the last columns empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    letters = sorted(name for name in names if len(name) == 1)
    before = [name for name in ("index", "g_index", "question", "hint") if name in names]
    rest = [name for name in names if name not in before and name not in letters]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*before, *letters, *rest], delimiter="\t", quoting=csv.QUOTE_ALL, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path
