"""Rows in the forms that people have: each is read with all of its meaning, refused with a reason, or left out by a setting."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from typing import Any

import pytest
from data_reading import words
from PIL import Image

from terrace.data.sources.conventions import Rules, convert_row
from terrace.data.sources.refusals import Refusal

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SEE = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "Paris"}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
TEXT64 = base64.b64encode(PNG).decode()
LINES64 = base64.encodebytes(PNG).decode()


def read(row: Any, kind: str = "qa", **rules: Any) -> str:
    return words(convert_row(row, "x", kind, Rules(**rules))[0])


def reason(row: Any, kind: str = "qa", **rules: Any) -> str:
    with pytest.raises(Refusal) as caught:
        convert_row(row, "x", kind, Rules(**rules))
    assert len(caught.value.detail) > 10
    return caught.value.reason


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "key",
    ["image", "images", "image_path", "img_path", "file_name", "filename", "filepath", "file", "path", "img", "image_file", "image_url",
     "url", "picture", "jpg", "photo", "Image", "IMAGE", "image_name", "media", "source_image", "Image-Path", "image path"],
)  # fmt: skip
def test_a_picture_under_any_usual_key(key: str) -> None:
    row = {key: "a.png", "text": "A cat."}
    sample, images = convert_row(row, "x", "caption")
    assert words(sample) == "<0>A cat."
    assert [image.path for image in images] == ["a.png"]
    asked, images = convert_row({key: "a.png", "question": "What?", "answer": "A cat."}, "x", "qa")
    assert words(asked) == "user: <0>What?| assistant: A cat."
    assert len(images) == 1


@pytest.mark.parametrize(
    "value",
    [TEXT64, f"data:image/png;base64,{TEXT64}", f"data:image/png;base64,{LINES64}", {"bytes": PNG}, {"bytes": PNG, "path": "gone.png"},
     {"bytes": TEXT64}, {"bytes": list(PNG)}, {"bytes": {"type": "Buffer", "data": list(PNG)}}, {"type": "Buffer", "data": list(PNG)}, PNG,
     {"url": f"data:image/png;base64,{TEXT64}"}],
)  # fmt: skip
def test_a_picture_as_bytes_in_any_usual_form(value: Any) -> None:
    _, [image] = convert_row({"image": value, "text": "x"}, "x", "caption")
    assert image.data == PNG


def test_other_keys_beside_a_picture_are_its_names_or_contradict_it() -> None:
    for row in (
        {"image": "a.png", "image_path": "a.png"}, {"image": "a.png", "images": ["a.png"]}, {"image": "a.png", "url": "http://x/b.jpg"},
        {"image": "a.png", "file_name": "old.png"}, {"image": {"bytes": PNG}, "image_path": "gone/a.png"},
        {"image": "d/a.png", "img": "a.png"},
    ):  # fmt: skip
        sample, images = convert_row({**row, "text": "x"}, "x", "caption")
        assert words(sample) == "<0>x"
        assert len(images) == 1
    assert reason({"image": "a.png", "images": ["b.png"], "text": "x"}, "caption") == "bad_row"
    assert reason({"image": "a.png", "images": ["a.png", "b.png"], "text": "x"}, "caption") == "bad_row"
    assert read({"image": "a.png", "images": ["b.png"], "text": "x"}, "caption", ignore=["images"]) == "<0>x"
    for url in ("https://x.org/page.html", "https://x.org/"):  # of a corpus of text
        assert read({"text": "x y", "url": url, "file_name": "page.warc"}, "text") == "x y"


@pytest.mark.parametrize("kind", ["caption", "ocr", "grounding", "gui", "chart", "counting"])
def test_a_kind_that_is_about_pictures_needs_one(kind: str) -> None:
    for row in ({"text": "A dog."}, {"image": None, "text": "A dog."}, {"images": [], "text": "A dog."}, {"image": "", "text": "A dog."},
                {"images": [None], "text": "A dog."}, {"messages": HI},
                {"image": {"bytes": None, "path": None}, "text": "A dog."}):  # fmt: skip
        assert reason(row, kind) == "missing_image"
    assert read({"text": "A dog."}, "text") == "A dog."
    assert read({"id": "t", "image": "", "messages": HI}) == "user: Hi| assistant: Hello"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"videos": ["a.mp4"], "messages": [{"role": "user", "content": "<video>?"}, SEE[1]]}, "unsupported"),
        ({"video": "a.mp4", "messages": HI}, "unsupported"),
        ({"audio": "a.wav", "messages": HI}, "unsupported"),
        ({"audios": ["a.wav"], "text": "x"}, "unsupported"),
        ({"messages": [{"role": "user", "content": "<video>?"}, SEE[1]]}, "placeholder_mismatch"),
        ({"messages": [{"role": "user", "content": "<audio>?"}, SEE[1]]}, "unsupported"),
        ({"messages": [{"role": "user", "content": "Picture 1: <img>a.png</img>\nWhat?"}, SEE[1]]}, "unsupported"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, SEE[1]]}, "unsupported"),
        ({"images": ["a.png", None], "messages": SEE}, "missing_image"),
        ({"img": "a.png", "messages": HI}, "placeholder_mismatch"),
        ({"file": "clip.mp4", "question": "?", "answer": "x"}, "unsupported"),
        ({"image_url": "a/photo", "messages": HI}, "placeholder_mismatch"),
        ({"image": "gs://bucket/a.png", "text": "x"}, "remote_image"),
        ({"image": "https://x.org/a.png", "text": "x"}, "remote_image"),
        ({"image": {"bytes": "no base64 ???"}, "text": "x"}, "not_an_image"),
        ({"image": {"bytes": 7}, "text": "x"}, "bad_row"),
        ({"image": 3.5, "text": "x"}, "bad_row"),
        ({"image": [["a.png"]], "text": "x"}, "bad_row"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["a"] * 2, "timestamps": [0, 1e300]}]}, SEE[1]]}, "bad_row"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["a"], "timestamps": [math.inf]}]}, SEE[1]]}, "bad_row"),
    ],
)  # fmt: skip
def test_media_that_cannot_be_read_refuse_the_row(row: dict, why: str) -> None:
    assert reason(row) == why


def test_sampled_frames_in_a_column_stand_where_the_text_says() -> None:
    asked = [{"role": "user", "content": "<image>and <video>?"}, SEE[1]]
    for videos in ([{"frames": ["0.jpg", "1.jpg"], "fps": 2}], {"frames": ["0.jpg", "1.jpg"], "timestamps": [0, 0.5]}):
        sample, images = convert_row({"messages": asked, "images": ["a.png"], "videos": videos}, "x", "qa")
        assert sample.messages[0]["content"][2] == {"type": "video", "frames": [1, 2], "timestamps": [0.0, 0.5]}
        assert [image.path for image in images] == ["a.png", "0.jpg", "1.jpg"]
    sample, _ = convert_row({"messages": asked, "images": ["a.png"], "videos": [["0.jpg", "1.jpg"]], "fps": 1}, "x", "qa")
    assert sample.messages[0]["content"][2]["timestamps"] == [0.0, 1.0]


def test_tags_are_placeholders_or_letters() -> None:
    row = {"messages": [{"role": "user", "content": "What does <image> do?"}, {"role": "assistant", "content": "It embeds."}]}
    assert reason(row) == "placeholder_mismatch"
    assert read(row, placeholders=False) == "user: What does <image> do?| assistant: It embeds."
    listed = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What does <image> do?"}]}, row["messages"][1]]}
    assert read(listed) == "user: What does <image> do?| assistant: It embeds."
    assert read({"image": "a.png", "text": "<image>\nA red square."}, "caption") == "<0>\nA red square."
    assert reason({"image": "a.png", "text": "<image><image>x"}, "caption") == "placeholder_mismatch"


def test_items_stand_for_the_image_of_their_index() -> None:
    def row(*indexes: int | None) -> dict:
        items = [{"type": "image", "index": index, "text": None} for index in indexes]
        return {"messages": [{"role": "user", "content": [*items, {"type": "text", "text": "?", "index": None}]}, SEE[1]],
                "images": ["a.png", "b.png"]}  # fmt: skip

    assert read(row(1, 0)) == "user: <1><0>?| assistant: A cat."
    assert read(row(None, None)) == "user: <0><1>?| assistant: A cat."
    for wrong in (row(0, 0), row(0, 2), row(0, None), row(-1, 0), row(True, 0)):
        assert reason(wrong) == "placeholder_mismatch"


# ---------------------------------------------------------------- keys


def test_a_key_that_nobody_reads_refuses_its_row() -> None:
    with pytest.raises(Refusal, match=r"nobody reads `captoin`; the nearest known name is `caption`.*ignore: \[captoin\]"):
        convert_row({"image": "a.png", "text": "x", "captoin": "y"}, "x", "caption")
    for row in ({"text": "x", "input_ids": [1, 2]}, {"messages": HI, "loss_mask": [0, 1]}, {"messages": [{**HI[0], "speaker": "A"}, HI[1]]},
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "bold": True}]}, HI[1]]},
                {"image": "a.png", "text": "x", "caption": "y"}, {"messages": HI, "text": "x"}, {"messages": HI, "conversations": HI},
                {"messages": SEE, "images": ["a.png"], "objects": {"bbox": [], "mask": [1]}}):  # fmt: skip
        assert reason(row) == "unknown_field"
    assert read({"image": "a.png", "text": "x", "caption": "x"}, "caption") == "<0>x"  # the same text twice
    described = {"id": 7, "licence": "MIT", "width": 3, "clip_score": 0.3, "image_id": 4, "source": "s", "url": "http://x", "nothing": None}
    assert read({"image": "a.png", "text": "x", **described, "empty": ""}, "caption") == "<0>x"


def test_inside_turns_and_items_little_is_a_description() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": TEXT64}
    row = {"messages": [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "?"}]}, HI[1]]}
    sample, [image] = convert_row(row, "x", "qa")
    assert (words(sample), image.data) == ("user: <0>?| assistant: Hello", PNG)
    for part in ({"type": "text", "text": "a", "source": "b.png"}, {"type": "image", "image": "a.png", "min_pixels": 3}):
        assert reason({"messages": [{"role": "user", "content": [part]}, HI[1]]}) == "unknown_field"
    assert reason({"messages": [{**HI[0], "url": "a.png"}, HI[1]]}) == "unknown_field"
    assert read({"messages": [{**HI[0], "id": 1, "timestamp": 3}, HI[1]]}) == "user: Hi| assistant: Hello"
    resized = {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "min_pixels": 3}]}, HI[1]]}
    assert read(resized, ignore=["content.min_pixels"]) == "user: <0>| assistant: Hello"


def test_ignored_keys_are_counted() -> None:
    rules = Rules(["mood", "messages.speaker", "*_tag"])
    row = {"messages": [{**HI[0], "speaker": "A"}, {**HI[1], "speaker": "B"}], "mood": 3, "a_tag": 1, "b_tag": 2}
    convert_row(row, "x", "qa", rules)
    assert rules.ignored == Counter({"messages.speaker": 2, "*_tag": 2, "mood": 1})
    with pytest.raises(Refusal, match="speaker"):
        convert_row({**row, "speaker": "C"}, "x", "qa", rules)  # the row's own is another key


# ---------------------------------------------------------------- masks and unwanted answers


@pytest.mark.parametrize("key", ["weight", "loss", "loss_scale", "loss_mask", "loss_weight", "trainable", "train"])
def test_masked_answers_are_not_learnt(key: str) -> None:
    turns = [HI[0], {**HI[1], key: 0}, HI[0], {**HI[1], key: 1.0}, HI[0], HI[1]]
    assert read({"messages": turns}).count("(masked)") == 1
    assert read({"messages": [{**HI[0], key: False}, {**HI[1], key: True}]}) == "user: Hi| assistant: Hello"
    assert reason({"messages": [HI[0], {**HI[1], key: False}]}) == "unwanted_answer"
    assert reason({"messages": [HI[0], {**HI[1], key: 0.5}]}) == "unsupported"
    assert reason({"messages": [{**HI[0], key: 1}, HI[1]]}) == "unsupported"
    assert reason({"messages": [HI[0], {**HI[1], "weight": 0, "loss": True}]}) == "bad_row"


def test_unwanted_answers_are_never_learnt_as_wanted() -> None:
    for label in (False, 0, "false"):
        assert reason({"messages": HI, "label": label}) == "unwanted_answer"
        assert reason({"prompt": "Hi", "completion": "Go away", "label": label}) == "unwanted_answer"
        assert reason({"instruction": "Hi", "output": "Go away", "kto_tag": label}) == "unwanted_answer"
    assert read({"messages": HI, "label": True}) == "user: Hi| assistant: Hello"
    for label, kept in ((False, False), (0, False), ("false", False), (True, True), (1, True), ("True", True)):
        for row in ({"messages": HI, "label": label}, {"prompt": "Hi", "completion": "Hello", "kto_tag": label}):
            assert convert_row(row, "x", "preference")[0].metadata == {"label": kept}
    assert reason({"messages": HI, "label": True, "kto_tag": False}, "preference") == "bad_row"
    assert reason({"messages": HI, "rejected_response": "Go", "label": False}, "preference") == "unwanted_answer"
    assert "label" not in convert_row({"messages": HI, "rejected_response": "Go", "label": True}, "x", "preference")[0].metadata
    assert reason({"messages": HI, "label": "spam"}) == "unknown_field"
    for row in ({"messages": HI, "rejected_response": "Go"}, {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
                {"chosen": HI, "rejected": [HI[0], {"role": "assistant", "content": "Go"}]},
                {"prompt": HI[:1], "chosen": HI[1:], "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "Go"}]}]},
                {"prompt": "Hi", "chosen": HI, "rejected": [HI[0], {"role": "assistant", "content": "Go"}]},
                {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
                 "rejected": {"from": "gpt", "value": "Go"}},
                {"instruction": "Hi", "chosen": "Hello", "rejected": "Go"},
                {"messages": HI, "rejected_messages": [HI[0], {**HI[1], "content": "Go"}]},
                {"input": {"messages": HI[:1]}, "preferred_output": HI[1:],
                 "non_preferred_output": [{**HI[1], "content": "Go"}]}):  # fmt: skip
        sample, _ = convert_row(row, "x", "preference")
        assert words(sample) == "user: Hi| assistant: Hello"
        assert sample.metadata["rejected"] == [{"type": "text", "text": "Go"}]
    boxed = {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "at <bbox>"}], "images": ["a.png"],
             "objects": {"bbox": [[1, 2, 3, 4]]}, "rejected_response": "at <bbox>"}  # fmt: skip
    assert reason(boxed, "preference") == "unsupported"
    given = {"prompt": [*HI, HI[0]], "chosen": [HI[1]], "rejected": "Go"}
    assert read(given, "preference") == "user: Hi| assistant(masked): Hello| user: Hi| assistant: Hello"


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "input": "2+2", "output": "4"}, "user: Add.\n2+2| assistant: 4"),
        ({"instruction": "Colour?", "input": "", "output": "Red", "images": ["a.png"]}, "user: <0>Colour?| assistant: Red"),
        ({"instruction": "More?", "output": "No", "history": [["Hi", "Hello"]], "system": "Be brief."},
         "system: Be brief.| user: Hi| assistant: Hello| user: More?| assistant: No"),
        ({"query": "<image>Colour?", "response": "Red", "images": ["a.png"]}, "user: <0>Colour?| assistant: Red"),
        ({"question": "2+2?", "answer": 4}, "user: 2+2?| assistant: 4"),
        ({"prompt": "2+2?", "completion": "4"}, "user: 2+2?| assistant: 4"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "C?"}]}], "images": ["a.png"],
          "completion": [{"role": "assistant", "content": [{"type": "text", "text": "Red"}]}]}, "user: <0>C?| assistant: Red"),
        ({"images": ["a.png"], "texts": [{"user": "C?", "assistant": "Red", "source": "s"}, {"user": "Sure?", "assistant": "Yes"}],
          "relevance_ratings": [1, 2], "relevance_min": 1}, "user: <0>C?| assistant: Red| user: Sure?| assistant: Yes"),
        ({"messages": json.dumps(HI)}, "user: Hi| assistant: Hello"),
        ({"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}], "image": "a.png"},
         "user: <0>?| assistant: x"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}, "b", {"type": "input_text", "text": "c"},
                                                     {"type": "text", "value": "d"}]}, HI[1]]}, "user: abcd| assistant: Hello"),
        (HI, "user: Hi| assistant: Hello"),
        ({"texts": ["One", "Two"]}, "One\n\nTwo"),
        ({"image": "a.png", "text": ["line 1", "line 2"]}, "<0>line 1\nline 2"),
        ({"image": "a.png", "text": "", "caption": "A square."}, "<0>A square."),
        ({"text": "\ufeffA text"}, "A text"),
        ({"messages": [HI[0], {"role": "assistant", "content": "\ufeffHello"}]}, "user: Hi| assistant: Hello"),
        ({"content": [{"type": "text", "text": "\ufeffA text"}]}, "A text"),
    ],
)  # fmt: skip
def test_forms(row: Any, expected: str) -> None:
    assert read(row) == expected


def test_prompts_of_rl_data() -> None:
    verl = {"data_source": "geo3k", "prompt": [{"role": "user", "content": "<image>Find x."}], "images": ["a.png"], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "3"}, "extra_info": {"split": "train"}}  # fmt: skip
    for row in (verl, {"images": ["a.png"], "problem": "<image>Find x.", "answer": "3"},
                {"prompt": "<image>Find x.", "solution": "3", "image": "a"}):  # fmt: skip
        sample, images = convert_row(row, "x", "prompt")
        assert words(sample) == "user: <0>Find x."
        assert sample.metadata["solution"] == "3"
        assert len(images) == 1
    assert read({"problem": "Find x.", "answer": "3"}) == "user: Find x.| assistant: 3"
    assert reason({"messages": HI[:1]}) == "empty_answer"


def test_system_tools_and_calls() -> None:
    system = "system: Be brief.| user: Hi| assistant: Hello"
    assert read({"system": "Be brief.", "messages": HI}) == read({"system_prompt": "Be brief.", "conversations": HI}) == system
    assert read({"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}, *HI]}) == system
    assert reason({"system": "Be long.", "messages": [{"role": "system", "content": "Be brief."}, *HI]}) == "bad_row"
    assert read({"tools": json.dumps([TOOL]), "messages": HI}) == read({"functions": [TOOL["function"]], "messages": HI})
    assert read({"tools": [TOOL], "messages": HI}).startswith(f"tools: {json.dumps([TOOL])}| user: Hi")
    assert reason({"tools": "Answer in French.", "messages": HI}) == "bad_row"
    assert reason({"tools": [TOOL], "functions": [TOOL["function"]], "messages": HI}) == "bad_row"
    told = {"role": "tool", "content": "18 C", "tool_call_id": "c", "name": "look"}
    expected = 'user: Hi| assistant: look({"at": "Paris"})| tool: 18 C| assistant: Hello'
    assert read({"messages": [HI[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, told, HI[1]]}) == expected
    older = {"role": "assistant", "content": "", "function_call": CALL["function"]}
    assert read({"messages": [HI[0], older, {"role": "function", "name": "look", "content": "18 C"}, HI[1]]}) == expected
    llama = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "Paris"}}'},
             {"from": "observation", "value": "18 C"}, {"from": "gpt", "value": "Hello"}]  # fmt: skip
    assert read({"conversations": llama}) == expected
    broken = {"function": {"name": "look", "arguments": "{no json"}}
    assert reason({"messages": [HI[0], {"role": "assistant", "tool_calls": [broken]}]}) == "bad_row"
    assert reason({"messages": [{**HI[0], "tool_calls": [CALL]}, HI[1]]}) == "bad_row"
    thinking = {"messages": [HI[0], {**HI[1], "reasoning_content": "A greeting."}]}
    assert read(thinking) == "user: Hi| assistant: (thinking: A greeting.)Hello"
    assert read(thinking, ignore=["reasoning_content"]) == "user: Hi| assistant: Hello"


# ---------------------------------------------------------------- boxes


def test_objects_in_other_forms() -> None:
    def row(objects: Any, answer: str = "<bbox>") -> dict:
        turns = [{"role": "user", "content": "<image>Where is the <ref-object>?"}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "images": ["a.png"], "objects": objects}

    expected = "user: <0>Where is the cat?| assistant: [1, 2, 30, 40]"
    for objects in ({"ref": ["cat"], "bbox": [[1, 2, 30, 40]]}, {"ref": "cat", "bbox": [1, 2, 30, 40]},
                    [{"caption": "cat", "bbox": [1, 2, 30, 40], "bbox_type": "real", "image": 0}]):  # fmt: skip
        assert read(row(objects)) == read(row(json.dumps(objects))) == expected
    for objects in (7, "no json", {"ref": 5, "bbox": [[1, 2, 3, 4]]}, [1], {"ref": ["cat"], "bbox": [[1, 2, 3, 4]], "image_id": ["x"]}):
        assert reason(row(objects)) == "bad_row"
    assert reason(row({"ref": ["cat"], "bbox": ["1234"]})) == "bad_coordinates"


# ---------------------------------------------------------------- anything at all


@pytest.mark.parametrize("row", [None, 5, "x", [], [1], True, {}, {"messages": {"a": 1}}, {"conversations": "x"}, {"messages": [[1]]},
                                 {"prompt": {"a": 1}}, {"chosen": 1, "rejected": 2}, {"texts": 5},
                                 {"texts": [{"a": 1}]}, {"content": {"a": 1}},
                                 {"history": 5, "query": "a"}, {"instruction": ["x"]}, {"input": {}, "preferred_output": 1}])  # fmt: skip
def test_what_is_no_row_is_refused(row: Any) -> None:
    for kind in ("caption", "qa", "prompt", "preference", "text"):
        reason(row, kind)
