"""The demo's corpus, folder recognition, readings of answers and pages: what is drawn is what is said."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terrace.data.sources.conventions import convert_row
from terrace.data.types import Sample
from terrace.demo import asking, corpus, scenes
from terrace.demo.along import Clock, Onlooker
from terrace.demo.asking import Asked, answers_after
from terrace.demo.command import DRAWN_RECIPE, in_short
from terrace.demo.corpus import SAMPLES
from terrace.demo.folder import find_sources, kind_of_rows, stage_weights
from terrace.demo.gallery import write_sheet
from terrace.demo.page import write_page
from terrace.demo.results import Results, Said, Shown, StageLosses, _chosen, read_stages
from terrace.demo.summary import answers_table, fell_in_rl, in_words, losses_table, rewards_table, summary_of, write_summary
from terrace.errors import InputError
from terrace.evaluate.answers import iou, is_right, numbers_in_brackets, questions_of
from terrace.families.interface import Sight
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.recipe.loading import load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
FEW = dict.fromkeys(corpus.SAMPLES, 3)
SIGHT = Sight(Qwen25VL(), (3136, 7056))


@pytest.mark.parametrize("kind", scenes.DRAWERS)
def test_a_scene_is_a_function_of_its_seed(kind):
    first, again, other = (scenes.DRAWERS[kind](seed) for seed in (5, 5, 6))
    assert first.picture.tobytes() == again.picture.tobytes()
    assert first.things == again.things
    assert first.picture.tobytes() != other.picture.tobytes()


@pytest.mark.parametrize("seed", range(20))
def test_things_lie_where_their_boxes_say_and_in_their_colour(seed):
    scene = scenes.draw_shapes(seed, most=6)
    pixels = np.asarray(scene.picture).astype(int)
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        assert 0 <= x1 < x2 <= scenes.SIZE
        assert 0 <= y1 < y2 <= scenes.SIZE
        # The light on a scene changes a colour by up to 35 of 255 levels.
        middle = pixels[(y1 + y2) // 2, (x1 + x2) // 2]
        assert np.abs(middle - np.array(scenes.COLOURS[thing.colour])).max() < 50, thing
    boxes = [thing.box for thing in scene.things]
    assert all(iou(a, b) == 0 for a in boxes for b in boxes if a is not b)


@pytest.mark.parametrize("seed", range(10))
def test_bars_are_as_high_as_their_values(seed):
    bars = scenes.draw_chart(seed).things
    units = [(bar.box[3] - bar.box[1]) / bar.value for bar in bars]
    assert units == pytest.approx([scenes.PATCH * 2 / 3] * 3, rel=0.02), "to the nearest pixel"


def test_corpus_rows_are_what_ingest_reads_and_pictures_are_not_shared(tmp_path):
    folder = corpus.write_corpus(tmp_path / "demo-corpus", samples=FEW, workers=1)
    pictures = []
    for source in FEW:
        lines = (folder / f"{source}.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        assert len(rows) == 3
        for row in rows:
            sample, images = convert_row(row, row["id"], "prompt" if source.startswith("rl/") else "qa")
            assert sample.id == row["id"]
            for image in images:
                path = (folder / source).parent / image.path
                assert Image.open(path).size == (scenes.SIZE, scenes.SIZE)
                pictures.append(path)
    assert len(pictures) == len(set(pictures)) > 30


def test_a_finished_corpus_is_left_alone_and_another_seed_draws_another(tmp_path):
    folder = corpus.write_corpus(tmp_path, samples={"captions": 2}, workers=1)
    before = (folder / "captions.jsonl").stat().st_mtime_ns, (folder / "captions.jsonl").read_text()
    corpus.write_corpus(tmp_path, samples={"captions": 2}, workers=1)
    assert ((folder / "captions.jsonl").stat().st_mtime_ns, (folder / "captions.jsonl").read_text()) == before
    corpus.write_corpus(tmp_path, seed=1, samples={"captions": 2}, workers=1)
    assert (folder / "captions.jsonl").read_text() != before[1]


def test_counts_in_answers_are_the_scene_s():
    for row, _ in corpus.draw_rows("counting", 3, 0, 30):
        for question, answer in zip(row["messages"][::2], row["messages"][1::2]):
            assert re.fullmatch("[0-6]", answer["content"])
            assert "How many" in question["content"]


def test_worked_answers_are_right():
    for row, _ in corpus.draw_rows("reasoning", 3, 0, 30):
        left, sign, right, result = re.search(r"(\d) ([+-]) (\d) = (\d)", row["messages"][1]["content"]).groups()
        assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
        assert f"\\boxed{{{result}}}" in row["messages"][1]["content"]


# ---------------------------------------------------------------- a folder of rows


def test_files_are_recognised_by_rows_first_and_name_second():
    chat = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}], "images": ["a"]}
    assert kind_of_rows([{"image": "a.jpg", "text": "x"}], "anything") == "caption"
    assert kind_of_rows([{"content": [{"type": "text", "text": "x"}]}], "x") == "document"
    assert kind_of_rows([{"text": "x"}], "x") == "text"
    assert kind_of_rows([chat], "ocr_train") == "ocr"
    assert kind_of_rows([chat], "science-qa") == "qa"
    assert kind_of_rows([chat], "dialogues") == "instruction"
    where = [chat["messages"][0], {"role": "assistant", "content": "<bbox>"}]
    assert kind_of_rows([{**chat, "messages": where, "objects": {"bbox": [[1, 2, 3, 4]]}}], "qa") == "grounding"
    assert kind_of_rows([{**chat, "messages": where, "objects": '[{"caption": "a", "bbox": [1, 2, 3, 4]}]'}], "qa") == "grounding"
    there = [chat["messages"][0], {"role": "assistant", "content": "<point>"}]
    assert kind_of_rows([{**chat, "messages": there, "objects": {"point": [[1, 2]]}}], "qa") == "gui"
    assert kind_of_rows([{**chat, "rejected_response": "y"}], "qa") == "preference"
    assert kind_of_rows([{**chat, "messages": chat["messages"][:1], "solution": "3", "task": "counting"}], "qa") == "prompt"
    assert kind_of_rows([{"a": 1}, {"messages": 7}, {"objects": [1], "messages": "x"}], "qa") == "unknown"


def test_names_are_made_of_ascii_letters_and_differ(tmp_path):
    row = json.dumps({"image": "a.png", "text": "x"})
    for name in ("数据", "图片", "été photos", "rows"):
        (tmp_path / f"{name}.jsonl").write_text(row + "\n")
    found, _ = find_sources(tmp_path)
    assert sorted(source.name for source in found) == ["rows", "rows-2", "rows-3", "t--photos"]


def test_a_folder_without_pictures_is_refused_by_name(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "only words"}\n')
    with pytest.raises(InputError, match=str(tmp_path)):
        find_sources(tmp_path)


def test_a_stage_whose_kinds_are_missing_takes_what_has_pictures(tmp_path):
    row = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}], "images": ["a"]}
    (tmp_path / "qa.jsonl").write_text(json.dumps(row) + "\nnot json\n")
    (tmp_path / "text.jsonl").write_text('{"text": "words"}\n')
    found, left_out = find_sources(tmp_path)
    assert left_out == []
    assert stage_weights({"caption": 1.0}, found) == {"qa": 1.0}
    assert stage_weights({"qa": 2.0, "text": 0.5}, found) == {"qa": 2.0, "text": 0.5}


def test_every_real_file_is_recognised(shared_data):
    found, left_out = find_sources(shared_data)
    kinds = {source.name: source.kind for source in found}
    assert kinds == {
        "captions": "caption", "grounding": "grounding", "gui": "gui", "interleaved": "document", "ocr": "ocr", "qa": "qa",
        "reasoning": "reasoning", "text": "text",
    }  # fmt: skip
    assert [line.split(":")[0] for line in left_out] == ["preference.jsonl"]


# ---------------------------------------------------------------- answers


def test_brackets_with_the_right_count_are_read():
    assert numbers_in_brackets('{"point": [12, 7]} or [1, 2, 3, 4]', 4) == (1, 2, 3, 4)
    assert numbers_in_brackets('{"point": [12, 7]}', 2) == (12, 7)
    assert numbers_in_brackets("[1, 2, 3]", 4) is None
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0


def _sample() -> Sample:
    turn = [
        {"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": [{"type": "box", "image": 0, "box": [112, 0, 224, 56]}]},
        {"role": "user", "content": [{"type": "text", "text": "How many?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
    ]
    return Sample("one", "qa", turn)


def test_each_turn_is_asked_alone_with_coordinates_of_the_resized_picture():
    where, count = questions_of(_sample(), [(224, 224)], SIGHT)
    assert where.expected == "[42, 0, 83, 21]"
    assert len(where.prompt.messages) == len(count.prompt.messages) == 1
    assert [item["type"] for item in count.prompt.messages[0]["content"]] == ["image", "text"]
    assert is_right("[40, 0, 80, 22]", where, 118.8)
    assert not is_right("[0, 0, 30, 22]", where, 118.8)
    assert not is_right("there", where, 118.8)
    assert is_right(" 3.", count, 118.8)
    assert not is_right("4", count, 118.8)


def test_a_caption_is_asked_as_its_beginning():
    content = [{"type": "image", "image": 0}, {"type": "text", "text": "A red star."}]
    [question] = questions_of(Sample("c", "caption", [{"role": "text", "content": content}]), [(224, 224)], SIGHT)
    assert question.expected == "A red star."
    assert question.prompt.messages[0]["content"] == content[:1]


# ---------------------------------------------------------------- pages


def test_the_demo_ends_with_an_rl_stage_on_three_tasks():
    recipe = load_recipe(DRAWN_RECIPE)
    *supervised, last = recipe.stages
    assert [stage.objective for stage in supervised] == ["lm"] * 4
    assert last.objective == "grpo"
    assert {recipe.data.sources[name].task for name in last.mixture.weights} == {"counting", "grounding", "visual_reasoning"}
    files = {Path(recipe.data.sources[name].uri).relative_to("runs/demo-corpus").with_suffix("") for name in last.mixture.weights}
    assert {str(file) for file in files} <= set(SAMPLES)


def test_stages_are_read_with_losses_or_rewards(tmp_path: Path):
    recipe = load_recipe(DRAWN_RECIPE)
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    figures = {"before": {"qa": 3.0}, "after": {"qa": 2.0}}
    for number, stage in enumerate(recipe.stages, start=1):
        folder = tmp_path / "stages" / f"{number:02d}-{stage.name}"
        folder.mkdir(parents=True)
        if stage.objective == "grpo":
            rows = [{"step": 1, "loss": None, "tasks": {"counting": {"reward": 0.25}}}, {"step": 2, "loss": 0.0, "tasks": {}}]
            figures = {
                "before": {"reward/counting": 0.25, "greedy_reward/counting": 0.4},
                "after": {"reward/counting": 0.5, "greedy_reward/counting": 0.75},
            }
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "result.json").write_text(json.dumps({"evaluation": figures, "steps": 2, "seconds": 1.0, "tokens": 10}))
    *supervised, last = read_stages(recipe, tmp_path)
    assert [stage.curve for stage in supervised] == [[2.5, 2.25]] * 4
    assert (last.curve, last.rewards, last.before, last.after) == ([], {"counting": [0.25]}, {"counting": 0.25}, {"counting": 0.5})
    assert last.greedy == {"counting": (0.4, 0.75)}


def test_page_and_sheet_hold_every_answer(tmp_path: Path):
    picture = scenes.draw_shapes(1).picture
    shown = [
        Shown("grounding", picture, "Where is <it>?", "[1, 2, 3, 4]", "[1, 2, 3, 4]", True, (0.1, 0.1, 0.5, 0.5), (0.1, 0.1, 0.5, 0.6)),
        Shown("gui", picture, "Click.", "[1, 2]", "[9, 9]", False, (0.1, 0.1), (0.9, 0.9)),
        Shown("reasoning", None, "1 + 1?", "2", "2", True, None, None),
    ]
    stages = [StageLosses("one", {"qa": 3.0}, {"qa": 2.0}, 2, 1.0, 100, [3.0, 2.5]), StageLosses("two", {}, {}, 1, 1.0, 10, [1.0])]
    rewards = {"counting": [0.2, 0.4, 0.6], "other": [0.1]}
    stages.append(StageLosses("rl", {"counting": 0.25, "other": 0.5}, {"counting": 0.75, "other": 0.4}, 3, 1.0, 9, [], rewards,
                              {"counting": (0.125, 0.625)}))  # fmt: skip
    results = Results("demo", stages, shown, {"grounding": (1, 1), "gui": (0, 1)}, 1_000_000)
    html = write_page(results, tmp_path / "page.html", "words & more").read_text(encoding="utf-8")
    assert html.count("data:image/jpeg;base64,") == 2
    assert "Where is &lt;it&gt;?" in html
    assert "words &amp; more" in html
    losses, rl = html.split("Reinforcement learning: rl")
    assert "<h2>One curriculum, 3 stages</h2>" in losses
    assert "counting" not in losses.lower(), "rewards are no losses"
    assert '<td>0.250<span class="arrow">→</span><b>0.750</b></td>' in rl
    assert '<td class="up">0.500' in rl, "a reward that fell is marked"
    assert '<td>0.125<span class="arrow">→</span><b>0.625</b></td>' in rl
    assert "http" not in html.replace("http-equiv", "")
    assert Image.open(write_sheet(results, tmp_path / "sheet.png")).size[0] > 1000


def _results() -> Results:
    after = {"one": {"qa": (1, 4), "gui": (0, 2)}, "two": {"qa": (4, 4), "gui": (1, 2)}, "rl": {"qa": (3, 4), "gui": (1, 2)}}
    shown = [Shown("qa", scenes.draw_shapes(1).picture, "Which <shape>?", "star", "star", True, None, None,
                   (Said("one", "circle", False), Said("two", "star", True), Said("rl", "star", True)))]  # fmt: skip
    stages = [
        StageLosses("one", {"qa": 3.0}, {"qa": 2.0}, 2, 1.0, 100, [3.0, 2.5]),
        StageLosses("two", {"qa": 2.0}, {"qa": 0.5}, 1, 1.0, 10, [1.0]),
        StageLosses("rl", {"counting": 0.25}, {"counting": 0.75}, 3, 1.0, 9, [], {"counting": [0.2]}, {"counting": (0.125, 0.625)}),
    ]
    return Results("demo", stages, shown, after["rl"], 1_000_000, after)


def test_stages_stand_side_by_side_and_what_fell_is_marked(tmp_path: Path):
    html = write_page(_results(), tmp_path / "page.html", "words").read_text(encoding="utf-8")
    places = [html.index(words) for words in ("In its own words", "after each stage", "The same question", "Loss on held-out")]
    assert places == sorted(places)
    assert '<span class="said bad">circle</span>' in html
    assert html.count('<span class="said good">star</span>') == 2
    assert '<td class="fell"><div class="share"><div class="track"><div class="fill" style="width:75%"></div></div><b>3 of 4</b>' in html
    assert html.count('class="fell"') == 2, "one kind and the sum of all"


def test_a_summary_is_what_the_tables_of_pages_are_made_of(tmp_path: Path):
    results = _results()
    with Clock() as clock:
        sum(range(10**6))
        summary = json.loads(write_summary(summary_of(results, clock, 1.5), tmp_path).read_text())
    assert (summary["right"], summary["asked"], summary["parameters"]) == (4, 6, 1_000_000)
    assert summary["cpu_seconds"] > 0
    assert summary_of(results, None, None)["seconds"] is None, "a demo that was continued has no time of its own"
    assert losses_table(summary).split("\n")[2:] == ["| qa | 3.000 -> 2.000 | 2.000 -> 0.500 |"]
    answers = ["| Answering | 4 | 1 | 4 | 3 |", "| Clicking | 2 | 0 | 1 | 1 |", "| all | 6 | 1 | 5 | 4 |"]
    assert answers_table(summary).split("\n")[2:] == answers
    assert rewards_table(summary).split("\n")[2:] == ["| Counting | 0.250 -> 0.750 | 0.125 -> 0.625 |"]
    assert in_words(summary).startswith("4 of 6 held-out questions right (67 %); 1,000,000 parameters; ")
    assert fell_in_rl(summary) == {}
    assert fell_in_rl(summary, margin=0) == {"qa": (4, 3)}
    assert in_short(results) == "4 of 6 held-out questions right (answering 3/4, clicking 1/2)"


def test_shown_are_right_ones_first_and_a_wrong_one_last():
    verdicts = {"a": [False, True, True, True], "b": [False] * 3, "c": [None] * 2, "d": [True]}
    questions = [(kind, verdict) for kind, found in verdicts.items() for verdict in found]
    assert [questions[place] for place in _chosen(questions, 3)] == [
        ("a", True), ("b", False), ("c", None), ("d", True), ("a", True), ("b", False), ("c", None), ("a", False), ("b", False),
    ]  # fmt: skip


def test_a_stage_is_asked_once_for_the_same_questions(tmp_path: Path, monkeypatch):
    asked = [Asked("qa", questions_of(_sample(), [(224, 224)], SIGHT)[1], [b"picture"], True)]
    calls: list[int] = []
    monkeypatch.setattr(asking, "load_model", lambda directory, batch_size: directory)
    monkeypatch.setattr(asking, "_ask", lambda model, items: calls.append(1) or ["3"] * len(items))
    (tmp_path / "result.json").write_text("{}")
    assert answers_after(tmp_path, asked) == answers_after(tmp_path, asked) == ["3"]
    assert len(calls) == 1
    (tmp_path / "result.json").write_text('{"steps": 2}')  # the stage was run again
    assert answers_after(tmp_path, asked * 2) == ["3", "3"]
    assert len(calls) == 2


def test_an_onlooker_tells_every_stage_but_the_last_and_survives_an_error(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("terrace.demo.along.LOOK_SECONDS", 0.005)
    recipe, heard, told = load_recipe(DRAWN_RECIPE), [], threading.Event()
    messages: list[str] = []

    def finished(stages: int) -> None:
        heard.append(stages)
        told.set()
        if stages == 2:
            raise OSError("no room")

    with Onlooker(recipe, tmp_path, finished, messages.append):
        for number, stage in enumerate(recipe.stages, start=1):
            folder = tmp_path / "stages" / f"{number:02d}-{stage.name}"
            folder.mkdir(parents=True)
            told.clear()
            (folder / "result.json").write_text("{}")
            assert number == len(recipe.stages) or told.wait(5)
            while number == 2 and not messages:
                time.sleep(0.005)
    assert heard == [1, 2, 3, 4]
    assert messages == ["the answers after stage 2 could not be shown (no room); training goes on"]


def test_pages_tell_what_the_demo_wrote():
    """docs/demo.json is the summary.json of a real `make demo`; nothing of the demo stands on a page that is not in it."""
    summary = json.loads((REPOSITORY / "docs" / "demo.json").read_text(encoding="utf-8"))
    readme, rl = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/rl.md"))
    for part in (in_words(summary), answers_table(summary), losses_table(summary)):
        assert part in readme, f"README.md lacks, or has an older form of:\n{part}"
    assert rewards_table(summary) in rl
    recipe = load_recipe(DRAWN_RECIPE)
    assert [stage["name"] for stage in summary["stages"]] == [stage.name for stage in recipe.stages]
    assert [stage["steps"] for stage in summary["stages"]] == [stage.budget.steps for stage in recipe.stages], "run the demo again"
    assert fell_in_rl(summary) == {}
