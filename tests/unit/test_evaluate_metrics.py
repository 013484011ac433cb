"""Figures and intervals, the reading of suites, and comparisons. No model is loaded."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from terrace.cli import main
from terrace.errors import InputError
from terrace.evaluate import metrics
from terrace.evaluate.compare import compare
from terrace.evaluate.replies import Reply
from terrace.evaluate.run import (
    flat_metrics,
    judged_rows,
    merge_replies,
    replies_of_worker,
    suite_scores,
    write_results,
)
from terrace.evaluate.suites import Reading, load_suites, tracked_name
from terrace.families.interface import Sight
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.rewards.rules.text_distance import edit_distance

SIGHT = Sight(Qwen25VL(), (3136, 50176))
SEEN_TWICE_AS_LARGE = {"image_sizes": [[100, 50]], "model_sizes": [[200, 100]]}


def test_boxes_and_points_in_the_pixels_that_the_model_saw():
    expected = {"bbox": [10, 10, 30, 20]}
    assert metrics.box_iou("[20, 20, 60, 40]", expected, SEEN_TWICE_AS_LARGE) == 1.0
    assert metrics.box_iou("[20, 20, 40, 40]", expected, SEEN_TWICE_AS_LARGE) == 0.5
    assert metrics.box_iou("[10, 10, 30, 20]", expected, SEEN_TWICE_AS_LARGE) < 0.1
    for unreadable in ("", "no box", "[20, 20, 60]", "[20, 20, 60, 40] or [1, 1, 2, 2]"):
        assert metrics.box_iou(unreadable, expected, SEEN_TWICE_AS_LARGE) == 0.0
    assert metrics.point_in_box("[20, 40]", expected, SEEN_TWICE_AS_LARGE) == 1.0
    assert metrics.point_in_box("[19, 40]", expected, SEEN_TWICE_AS_LARGE) == 0.0
    assert metrics.point_in_box("[20, 20, 60, 40]", expected, SEEN_TWICE_AS_LARGE) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [("There are 3 circles.", "3", 1.0), ("three", "3", 1.0), ("3 or 4", "3", 0.0), ("4", "3", 0.0), ("", "0", 0.0)],
)
def test_counts(answer, expected, value):
    assert metrics.exact_count(answer, expected) == value


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("104", "100", 1.0), ("105", "100", 1.0), ("106", "100", 0.0), ("95", "100", 1.0), ("94", "100", 0.0),
        ("0.01", "0", 0.0), ("0", "0", 1.0), ("41%", "40%", 1.0), ("The answer is 1,520.", "1500", 1.0), ("-100", "100", 0.0),
        ("germany", "Germany", 1.0), ("Germany", "France", 0.0), ("", "5", 0.0), ("Yes.", "Yes", 1.0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(answer, expected, value):
    assert metrics.relaxed_match(answer, expected) == value


def slow_distance(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


@settings(max_examples=150, deadline=None)
@given(st.text("abc é漢", max_size=70), st.text("abc é漢", max_size=70))
def test_edit_distance_equals_the_textbook(first, second):
    assert edit_distance(first, second) == slow_distance(first, second)


def test_text_in_pictures():
    assert metrics.exact_text("year\n1931  1932 ", "year 1931\n1932") == 1.0
    assert metrics.edit_distance_share("kitten", "sitting") == pytest.approx(3 / 7)
    assert metrics.edit_distance_share("", "") == 0.0
    assert metrics.edit_distance_share("", "abc") == 1.0


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("Paris", "paris ", 1.0), ("kitten", "sitting", 4 / 7), ("abc", "xyz", 0.0), ("ab", "ax", 0.5), ("", "a", 0.0),
        ("a  b", "A b", 1.0),        ("abcd", "abxy", 0.5), ("abcde", "abxyz", 0.0),
    ],
)  # fmt: skip
def test_anls_as_published(answer, expected, value):
    assert metrics.anls(answer, expected) == pytest.approx(value)


@pytest.mark.parametrize(
    ("kind", "solution", "answers"),
    [
        ("ocr", ["Main St.", "Main Street"], {"Main Street": {"exact": 1.0, "anls": 1.0, "edit_distance": 0.0}, "x": {"anls": 0.0}}),
        ("chart", ["12 %", "twelve"], {"12": {"relaxed_accuracy": 1.0}, "twelve": {"relaxed_accuracy": 1.0}}),
        ("chart", ["12 %", "twelve"], {"30": {"relaxed_accuracy": 0.0}}),
        ("counting", ["3", "4"], {"4": {"accuracy": 1.0}, "5": {"accuracy": 0.0}}),
        ("reasoning", ["1/2", "x=1/2"], {"0.5": {"accuracy": 1.0}, "2": {"accuracy": 0.0}}),
        ("caption", ["a red ball", "one ball that is red"], {"one ball that is red": {"chrf": 100.0}}),
    ],
)  # fmt: skip
def test_several_accepted_answers_count_by_the_best(tmp_path, kind, solution, answers):
    [suite] = load_suites([f"{kind}:{write_rows(tmp_path, [box_row(solution=solution)] * len(answers))}"], Reading(SIGHT))
    verdicts = suite.kind.judge(suite.cases, list(answers), SIGHT)
    for verdict, expected in zip(verdicts, answers.values()):
        assert {name: verdict.values[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("stem", "name"),
    [("dev", "dev"), ("dev (1)", "dev _1"), ("图表", "__"), ("a+b@v2", "a_b_v2"), ("a.b-c_d e", "a.b-c_d e"), ("...", "_"), ("50%", "50_")],
)
def test_names_of_suites_are_names_of_metrics(tmp_path, stem, name):
    assert tracked_name(stem) in (name, name + "_")
    [suite] = load_suites([f"counting:{write_rows(tmp_path, [box_row(solution='3')], stem + '.jsonl')}"], Reading(SIGHT))
    assert re.fullmatch(r"[/\w.\- :]+", suite.label, re.ASCII)


def test_categories_are_names_of_metrics_too():
    value = {"accuracy": {"value": 0.5}}
    categories = dict.fromkeys(("a/b", "a (b)", "a&b", "a_b"), value)
    flat = flat_metrics({"suites": {"mmbench:dev": {"scores": value, "categories": categories}}})
    assert len(flat) == 5
    assert all(re.fullmatch(r"[/\w.\- :]+", name, re.ASCII) for name in flat)


def test_captions_equal_sacrebleu_over_the_corpus():
    from sacrebleu.metrics import BLEU

    said = ["a red circle lies on a blue square", "two cats", "", "the dog runs over the green grass"]
    wanted = ["a red circle lies on the blue square", "two cats sleep", "a tree", "a dog runs over green grass"]
    values = [metrics.caption_values(a, b) for a, b in zip(said, wanted)]
    bleu = metrics.corpus_bleu(values).score
    assert bleu.value == pytest.approx(BLEU().corpus_score(said, [wanted]).score, abs=1e-9)
    assert bleu.low <= bleu.value <= bleu.high
    assert bleu.low < bleu.high
    assert metrics.caption_values("一只猫在垫子上", "一只猫在垫子上")["chrf"] == pytest.approx(100.0)


def test_wilson_is_the_published_interval():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20
    score = metrics.wilson([1.0] * 81 + [0.0] * 182)
    assert (round(score.low, 4), round(score.high, 4)) == (0.2553, 0.3662)
    none = metrics.wilson([0.0] * 20)
    assert none.low == 0.0
    assert round(none.high, 4) == 0.1611


def test_the_bootstrap_covers_the_true_mean():
    random = np.random.default_rng(3)
    inside = 0
    for _ in range(60):
        score = metrics.mean(random.normal(0.5, 0.2, 60)).score
        inside += score.low <= 0.5 <= score.high
    assert 51 <= inside <= 60
    assert metrics.mean([0.25, 0.75]).score == metrics.mean([0.25, 0.75]).score  # seeded


def test_a_paired_difference_sees_what_two_intervals_do_not():
    random = np.random.default_rng(0)
    easy = random.random(400)
    first, second = metrics.mean(easy), metrics.mean(easy + 0.01)
    low, high = metrics.paired_interval(first, second)
    assert low == pytest.approx(0.01)
    assert high == pytest.approx(0.01)
    assert first.score.high > second.score.low  # the separate intervals overlap


# ---------------------------------------------------------------- files


def write_rows(folder: Path, rows: list, name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (200, 100), (10, 20, 30)).save(folder / "a.png")
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def box_row(**changes):
    row = {
        "messages": [{"role": "user", "content": "<image>Where is it?"}],
        "images": ["a.png"],
        "solution": {"bbox": [10, 10, 50, 60]},
    }
    return {**row, **changes}


def test_rows_with_answers_and_rows_with_solutions_expect_the_same(tmp_path):
    answered = {
        "messages": [*box_row()["messages"], {"role": "assistant", "content": "<bbox>"}],
        "images": ["a.png"], "objects": {"ref": [], "bbox": [[10, 10, 50, 60]]},
    }  # fmt: skip
    [suite] = load_suites([f"grounding:{write_rows(tmp_path, [box_row(), answered])}"], Reading(SIGHT))
    assert suite.cases[0].expected == suite.cases[1].expected
    assert suite.cases[0].prompt.messages == suite.cases[1].prompt.messages
    assert suite.cases[0].digest == suite.cases[1].digest


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("grounding", box_row(images=["gone.png"]), "image gone.png is in none of"),
        ("grounding", box_row(solution={"bbox": [50, 10, 10, 60]}), "is not .x1, y1, x2, y2. with an area"),
        ("grounding", box_row(solution=None), "neither `solution` nor an assistant's turn"),
        ("grounding", box_row(solution={"bbox": [1, 1, 5, 5], "image": 3}), "image 3, which the row does not show"),
        ("gui", box_row(images=["a.png", "a.png"]), "image"),
        ("counting", box_row(solution="many"), "'many' is no number"),
        ("reasoning", {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}, "boxed"),
        ("caption", {"text": "no image"}, "without an image"),
        ("ocr", [1, 2], "not a JSON object"),
        ("ocr", box_row(solution={"text": "x"}), "is no text and no list of texts"),
        ("ocr", box_row(solution=[]), "neither `solution` nor an assistant's turn"),
        ("ocr", box_row(solution=["x", {"y": 1}]), "is no list of accepted texts"),
        ("counting", box_row(solution=["3", "many"]), "'many' is no number"),
    ],
)  # fmt: skip
def test_a_damaged_row_stops_the_suite_by_name(tmp_path, kind, row, message):
    good = {
        "counting": box_row(solution="3"),
        "reasoning": box_row(solution="3"),
        "caption": {"image": "a.png", "text": "x"},
        "ocr": box_row(solution="x"),
    }
    path = write_rows(tmp_path, [good.get(kind, box_row()), row])
    with pytest.raises(InputError, match=message) as caught:
        load_suites([f"{kind}:{path}"], Reading(SIGHT))
    assert f"{path}, row 2" in str(caught.value)


def test_broken_lines_images_and_names(tmp_path):
    path = write_rows(tmp_path, [box_row()])
    path.write_bytes(path.read_bytes() + b'{"messages": \n')
    with pytest.raises(InputError, match="row 2: it is not JSON"):
        load_suites([f"grounding:{path}"], Reading(SIGHT))
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"row 1: image a\.png"):
        load_suites([f"grounding:{path}"], Reading(SIGHT))
    for text, message in (
        ("groundin:x", "did you mean grounding"), ("grounding", "grounding:PATH"), ("ocr:/nowhere.jsonl", "does not exist"),
        (f"loss:{tmp_path}", "no prepared.json"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_suites([text], Reading(SIGHT))


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path):
    path = write_rows(tmp_path, [box_row(solution="3", messages=[{"role": "user", "content": "<image>one\u2028two"}])])
    [suite] = load_suites([f"counting:{path}"], Reading(SIGHT))
    assert suite.cases[0].text == "<image>one\u2028two"


# ---------------------------------------------------------------- runs and comparisons


def evaluated(texts, say, out_dir, **reading):
    suites = load_suites(texts, Reading(SIGHT, **reading))
    all_rows, entries = [], {}
    for suite in suites:
        replies = replies_of_worker(suite, lambda _, batch: [Reply(say(case)) for case in batch])
        rows = judged_rows(suite, merge_replies(suite, [replies]), SIGHT)
        all_rows += rows
        entries[suite.label] = suite_scores(suite, rows)
    scores = {"version": 1, "model": "m", "pixels": list(SIGHT.pixels), "suites": entries}
    write_results(out_dir, scores, all_rows)
    return scores


def test_a_comparison_is_paired_and_refuses_other_suites(tmp_path, capsys):
    path = write_rows(tmp_path, [box_row(solution=str(n % 5)) for n in range(60)])
    text = f"counting:{path}"
    evaluated([text], lambda case: "1", tmp_path / "one")
    evaluated([text], lambda case: case.expected, tmp_path / "all")
    [found] = compare(tmp_path / "one", tmp_path / "all")
    assert (found.first, found.second) == (0.2, 1.0)
    assert found.clear
    assert found.low < 0.8 < found.high
    [same] = compare(tmp_path / "all", tmp_path / "all")
    assert same.difference == same.low == same.high == 0
    assert not same.clear
    assert main(["evaluate", "--compare", str(tmp_path / "one"), str(tmp_path / "all")]) == 0
    assert "+0.800" in capsys.readouterr().out

    evaluated([text], lambda case: "1", tmp_path / "few", limit=30)
    with pytest.raises(InputError, match="cases 60 and 30"):
        compare(tmp_path / "one", tmp_path / "few")
    rows = [box_row(solution=str((n + 1) % 5)) for n in range(60)]
    other = write_rows(tmp_path / "x", rows)
    evaluated([f"counting:{other}"], lambda case: "1", tmp_path / "other")
    with pytest.raises(InputError, match="expected answers differ"):
        compare(tmp_path / "one", tmp_path / "other")
    evaluated([text, f"ocr:{path}"], lambda case: "1", tmp_path / "more")
    assert main(["evaluate", "--compare", str(tmp_path / "one"), str(tmp_path / "more")]) == 2
    assert "different suites" in capsys.readouterr().err


def test_an_answer_that_nobody_can_judge_is_counted_and_left_out(tmp_path, monkeypatch):
    from terrace.rewards.types import Outcome

    path = write_rows(
        tmp_path, [{"messages": [{"role": "user", "content": f"{n}+1?"}], "solution": str(n + 1)} for n in range(4)]
    )
    monkeypatch.setattr(
        "terrace.evaluate.suites.SandboxPool.judge",
        lambda self, rule, items, options=None: [Outcome(1.0), Outcome(None, "time limit"), Outcome(1.0), Outcome(0.0)],
    )
    scores = evaluated([f"reasoning:{path}"], lambda case: "2", tmp_path / "out")
    entry = scores["suites"]["reasoning:rows"]
    assert entry["not_judged"] == 1
    assert entry["scores"]["accuracy"]["count"] == 3
    assert flat_metrics(scores) == {"reasoning:rows/accuracy": pytest.approx(2 / 3)}


def test_an_oracle_and_a_mute_model_on_the_real_files(shared_data, tmp_path):
    """Coordinates of the oracle are in the pixels that the model would see."""
    from terrace.evaluate.suites import model_pixels

    files = {
        "grounding": "rl/grounding.jsonl", "gui": "rl/gui.jsonl", "counting": "rl/counting.jsonl", "ocr": "ocr.jsonl",
        "chart": "rl/visual_math.jsonl", "caption": "captions.jsonl", "reasoning": "rl/text_math.jsonl",
    }  # fmt: skip

    def oracle(case):
        if not isinstance(case.expected, dict):
            return case.expected
        seen = model_pixels(case, SIGHT)
        scale = [new / old for new, old in zip(seen["model_sizes"][0], seen["image_sizes"][0])]
        box = [round(value * scale[place % 2], 2) for place, value in enumerate(case.expected["bbox"])]
        point = [round((box[0] + box[2]) / 2, 1), round((box[1] + box[3]) / 2, 1)]
        return str(point if "point" in case.text else box)

    texts = [f"{kind}:{shared_data / file}" for kind, file in files.items()]
    right = flat_metrics(evaluated(texts, oracle, tmp_path / "oracle", limit=12))
    wrong = flat_metrics(evaluated(texts, lambda case: "", tmp_path / "mute", limit=12))
    perfect = {
        name: 100.0 if name.endswith(("chrf", "bleu")) else 0.0 if name.endswith("distance") else 1.0 for name in right
    }
    assert right == pytest.approx(perfect, abs=2e-2)
    assert all(wrong[name] == (1.0 if name.endswith("distance") else 0.0) for name in right)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["evaluate"]) == 2
    assert main(["evaluate", str(tmp_path), "ocr:x"]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_pictures_are_part_of_the_fingerprint(tmp_path):
    path = write_rows(tmp_path, [box_row()])
    before = load_suites([f"grounding:{path}"], Reading(SIGHT))[0].fingerprint
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), (11, 20, 30)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert load_suites([f"grounding:{path}"], Reading(SIGHT))[0].fingerprint != before
    assert load_suites([f"grounding:{path}"], Reading(SIGHT, max_new_tokens=9))[0].fingerprint != before
