"""CircularEval's arithmetic on models whose answers are known, and the reading of MMBench's TSV. No model is loaded."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terrace.errors import InputError, TerraceError
from terrace.evaluate.cases import Case
from terrace.evaluate.choice_file import read_questions
from terrace.evaluate.choice_question import ChoiceQuestion, rotations
from terrace.evaluate.multiple_choice import (
    chosen_letter,
    circular_right,
    plain_right,
    question_cases,
)
from terrace.evaluate.replies import Reply
from terrace.evaluate.run import (
    judged_rows,
    merge_replies,
    read_results,
    replies_of_worker,
    suite_scores,
    write_results,
)
from terrace.evaluate.suites import KINDS, Reading, Suite, fingerprint, load_suites
from terrace.evaluate.vlmevalkit import write_vlmevalkit
from terrace.families.interface import Sight
from terrace.families.qwen2_5_vl import Qwen25VL

SIGHT = Sight(Qwen25VL(), (3136, 50176))
LETTERS = "ABCD"


def picture(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (colour, 20, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def questions(count: int, choices: int = 4) -> list[ChoiceQuestion]:
    random = np.random.default_rng(0)
    texts = ["red apple", "green pear", "small plum", "ripe fig", "sour lime"]
    return [
        ChoiceQuestion(i, f"What is fruit {i}?", tuple(texts[:choices]), int(random.integers(choices)))
        for i in range(count)
    ]


def suite_of(cases: list[Case]) -> Suite:
    kind = KINDS["mmbench"]
    return Suite("mmbench:made", kind, Path("made.tsv"), cases, 32, fingerprint(kind, cases, 32))


def scores_with(cases: list[Case], say: Callable[[Case], str]) -> dict[str, dict]:
    suite = suite_of(cases)
    replies = replies_of_worker(suite, lambda _, batch: [Reply(say(case)) for case in batch])
    return suite_scores(suite, judged_rows(suite, merge_replies(suite, [replies]), SIGHT))["scores"]


def test_every_choice_stands_at_every_letter_once():
    [question] = questions(1)
    asked = rotations(question)
    assert len({one.choices for one in asked}) == 4
    assert sorted(one.right_letter for one in asked) == list(LETTERS)
    for one in asked:
        assert one.choices[one.right] == question.choices[question.right]
    for place in range(4):
        assert sorted(one.choices[place] for one in asked) == sorted(question.choices)


def test_a_fixed_letter_is_right_by_luck_when_asked_once_and_never_in_circles():
    cases = question_cases(questions(200))
    scores = scores_with(cases, lambda case: "A")
    share = np.mean([case.expected == "A" for case in cases if case.rotation == 0])
    assert scores["accuracy"]["value"] == pytest.approx(share)
    assert 0.15 < share < 0.35
    assert scores["circular_accuracy"]["value"] == 0.0
    # over all rotations a fixed letter is right exactly once in four
    assert np.mean([case.expected == "A" for case in cases]) == 0.25


def test_a_random_model_scores_a_quarter_and_a_256th():
    cases = question_cases(questions(4_000))
    random = np.random.default_rng(1)
    scores = scores_with(cases, lambda case: LETTERS[random.integers(4)])
    assert scores["accuracy"]["value"] == pytest.approx(1 / 4, abs=0.03)
    assert scores["circular_accuracy"]["value"] == pytest.approx(1 / 256, abs=0.004)
    assert scores["circular_accuracy"]["low"] < 1 / 256 < scores["circular_accuracy"]["high"]


@pytest.mark.parametrize(
    "say", [lambda case: f"The answer is {case.expected}.", lambda case: case.metadata["choices"][case.expected]]
)
def test_an_oracle_is_always_right(say):
    scores = scores_with(question_cases(questions(50)), say)
    for name in ("accuracy", "circular_accuracy"):
        assert scores[name]["value"] == 1.0
        assert scores[name]["count"] == 50
        assert scores[name]["high"] == 1.0


def test_one_wrong_rotation_loses_the_question():
    cases = question_cases(questions(10, choices=3))
    assert len(cases) == 30
    scores = scores_with(cases, lambda case: "none" if (case.group, case.rotation) == ("3", 2) else case.expected)
    assert scores["accuracy"]["value"] == 1.0
    assert scores["circular_accuracy"]["value"] == pytest.approx(0.9)


def test_plain_and_circular_on_a_table():
    results = [("a", 0, True), ("a", 1, False), ("b", 0, True), ("b", 1, True), ("c", 0, False), ("c", 1, True)]
    assert plain_right(results) == {"a": True, "b": True, "c": False}
    assert circular_right(results) == {"a": False, "b": True, "c": False}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(b)", "B"), ("B. green pear", "B"), ("The answer is C", "C"), ("green pear", "B"), ("A or B", None),
        ("A circle", None), ("A. red apple, because it is red", "A"), ("B\n\nA and C are wrong.", "B"),
        ("not B", None), ("", None),
        ("B is wrong, so C", "C"), ("I can't tell, B has no support", None), ("A, B", None), ("(A) or (B)", None),
        ("A is correct.", "A"), ("It is the small plum.", "C"),
        ("<think>A or B?</think>D", "D"), ("\\boxed{C}", "C"), ("Z", None),
    ],
)  # fmt: skip
def test_the_letter_that_an_answer_names(answer, letter):
    assert chosen_letter(answer, questions(1)[0].letters) == letter


# ---------------------------------------------------------------- workers


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_scores_do_not_depend_on_the_number_of_workers(workers):
    cases = question_cases(questions(37))
    suite = suite_of(cases)

    def answerer(suite: Suite, batch: Sequence[Case]) -> list[Reply]:
        # depends on the whole batch, as rounding does in a real one
        return [Reply(LETTERS[(len(batch) + int(batch[0].id) + int(case.id)) % 4]) for case in batch]

    whole = merge_replies(suite, [replies_of_worker(suite, answerer, 5)])
    parts = [replies_of_worker(suite, answerer, 5, worker, workers) for worker in range(workers)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 5
    merged = merge_replies(suite, parts[::-1])
    assert merged == whole
    assert suite_scores(suite, judged_rows(suite, merged, SIGHT)) == suite_scores(
        suite, judged_rows(suite, whole, SIGHT)
    )


def test_a_lost_or_doubled_answer_is_an_error():
    suite = suite_of(question_cases(questions(3)))
    part = replies_of_worker(suite, lambda _, batch: [Reply("A")] * len(batch))
    with pytest.raises(TerraceError, match="answered by two workers"):
        merge_replies(suite, [part, {0: Reply("A")}])
    del part[7]
    with pytest.raises(TerraceError, match="1 of 12 cases have no answer, the first is 3000001"):
        merge_replies(suite, [part])


# ---------------------------------------------------------------- the file


def write_tsv(path: Path, **change: str) -> Path:
    image = base64.b64encode(picture()).decode()
    row = {
        "index": "5",
        "question": "Which?",
        "hint": "nan",
        "A": "x",
        "B": "y",
        "C": "",
        "D": "",
        "answer": "B",
        "image": image,
    }
    rows = [
        {**row, "index": "4"},
        {**row, **change},
        {**row, "index": "1000004", "answer": "A", "A": "y", "B": "x", "image": "4"},
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_file_with_rotations_of_its_own_is_rotated_once(tmp_path):
    found = read_questions(write_tsv(tmp_path / "a.tsv", image="4"))
    assert [(one.index, one.right_letter, one.choices, one.hint) for one in found] == [
        (4, "B", ("x", "y"), ""), (5, "B", ("x", "y"), "")
    ]  # fmt: skip
    assert found[1].images == found[0].images == (picture(),)
    assert [case.id for case in question_cases(found)] == ["4", "1000004", "5", "1000005"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "C"}, "the answer 'C' is none of its 2 choices"),
        ({"answer": ""}, "without answers there is nothing to score"),
        ({"B": ""}, "without a gap"),
        ({"image": "@@@@"}, "not base64"),
        ({"image": "99"}, "known image format|not base64"),
        ({"image": "5"}, "row 5, which has no picture of its own"),
        ({"image": "[1, 2]"}, "list of images"),
        ({"answer": "x"}, "the answer 'x' is none"),
        ({"image": base64.b64encode(b"hello there, no image").decode()}, "holds text or nothing"),
        ({"index": "4"}, "the index 4 was there before"),
        ({"index": "x"}, "no whole number"),
        ({"question": ""}, "question is empty"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, change, message):
    path = write_tsv(tmp_path / "a.tsv", **change)
    with pytest.raises(InputError, match=message) as caught:
        read_questions(path)
    assert f"{path}, row 3" in str(caught.value)


@pytest.mark.parametrize(
    ("write", "pictures"),
    [
        (lambda data: base64.b64encode(data).decode(), 1),
        (lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="), 1),
        (lambda data: "data:image/png;base64," + base64.b64encode(data).decode(), 1),
        (lambda data: str([base64.b64encode(data).decode()] * 2), 2),
        (lambda data: json.dumps([base64.b64encode(data).decode()]), 1),
        (lambda data: "pictures/a.png", 1),
        (lambda data: "nan", 0),
        (lambda data: "", 0),
        (lambda data: "[]", 0),
    ],
)
def test_every_way_to_write_a_picture(tmp_path, write, pictures):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture())
    [_, second] = read_questions(write_tsv(tmp_path / "a.tsv", image=write(picture())))
    assert second.images == (picture(),) * pictures
    assert [len(case.images) for case in question_cases([second])] == [pictures] * 2


def test_image_path_is_read_or_refused_and_never_left_out(tmp_path):
    head, row = ["index", "question", "A", "B", "answer", "image_path"], ["1.0", "Which?", "x", "y", "(b)", "['p/a.png', 'p/a.png']"]
    path = tmp_path / "a.tsv"
    path.write_text("\ufeff" + "\t".join(head) + "\n" + "\t".join(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"row 2: image p/a\.png is in none of"):
        read_questions(path)
    (tmp_path / "root" / "p").mkdir(parents=True)
    (tmp_path / "root" / "p" / "a.png").write_bytes(picture())
    [question] = read_questions(path, images_root=tmp_path / "root")
    assert (question.index, question.right_letter, len(question.images)) == (1, "B", 2)
    [suite] = load_suites([f"mmbench:{path}"], Reading(SIGHT, images_root=tmp_path / "root"))
    assert [len(case.images) for case in suite.cases] == [2, 2]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "b.tsv").write_text("index\tquestion\n1\twhat?\n")
    with pytest.raises(InputError, match="the columns A, B, answer are missing"):
        read_questions(tmp_path / "b.tsv")
    (tmp_path / "c.tsv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="no tab-separated text"):
        read_questions(tmp_path / "c.tsv")


# ---------------------------------------------------------------- the real file, and VLMEvalKit's


def test_the_real_file_and_what_vlmevalkit_reads(shared_data, tmp_path):
    path = shared_data / "eval" / "grocery_mmbench.tsv"
    [suite] = load_suites([f"mmbench:{path}"], Reading(SIGHT, limit=20))
    assert len(suite.cases) == 80
    assert suite.cases[0].sizes
    assert "\nA. " in suite.cases[0].text
    [again] = load_suites([f"mmbench:{path}"], Reading(SIGHT, limit=20))
    [fewer] = load_suites([f"mmbench:{path}"], Reading(SIGHT, limit=19))
    assert suite.fingerprint == again.fingerprint != fewer.fingerprint
    replies = replies_of_worker(suite, lambda _, batch: [Reply(case.expected) for case in batch])
    rows = judged_rows(suite, merge_replies(suite, [replies]), SIGHT)
    scores = {"version": 1, "model": "m", "pixels": list(SIGHT.pixels), "suites": {suite.label: suite_scores(suite, rows)}}
    assert scores["suites"][suite.label]["scores"]["circular_accuracy"]["value"] == 1.0
    write_results(tmp_path / "out", scores, rows)
    assert read_results(tmp_path / "out") == (scores, rows)

    files = write_vlmevalkit(tmp_path / "kit", tmp_path / "final", "final", scores, rows)
    assert [file.name for file in files] == ["grocery_mmbench.tsv", "final_grocery_mmbench.tsv", "config.json"]
    asked, said = (list(csv.DictReader(file.open(newline=""), delimiter="\t")) for file in files[:2])
    # how VLMEvalKit scores: group by index mod 1,000,000, right if every row's prediction is that row's answer
    assert [int(row["index"]) % 1_000_000 for row in said] == [int(row["g_index"]) for row in said]
    assert all(row["prediction"] == row["answer"] for row in said)
    assert len(asked) == len(said) == 80
    pictures = {row["index"]: row["image"] for row in asked}
    assert all(len(pictures[row["g_index"]]) > 1_000 for row in asked)
