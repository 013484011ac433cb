"""Rows as people have them, and what each becomes."""

from __future__ import annotations

import base64

import pytest

from terrace.data.sources.conventions import convert_row
from terrace.data.sources.placeholders import resolve_coordinates
from terrace.data.sources.refusals import Refusal


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(number: int) -> dict:
    return {"type": "image", "image": number}


def converted(row: dict, kind: str = "qa") -> list[list]:
    """[[role, content], ...] and the images' paths."""
    sample, images = convert_row(row, "x-1", kind)
    return [[m["role"], m["content"]] for m in sample.messages] + [[reference.path for reference in images]]


def refused(row: object, kind: str = "qa") -> str:
    with pytest.raises(Refusal) as caught:
        convert_row(row, "x-1", kind)
    return caught.value.reason


def test_captions_documents_and_text_are_running_text() -> None:
    assert converted({"image": "a.jpg", "text": "A cat."}) == [["text", [image(0), text("A cat.")]], ["a.jpg"]]
    assert converted({"images": ["a.jpg", "b.jpg"], "caption": "Two."})[0][1] == [image(0), image(1), text("Two.")]
    assert converted({"text": "Only <image> text"}) == [["text", [text("Only <image> text")]], []]
    document = {"content": [text("One"), text("Two"), {"type": "image", "image": "a.jpg"}, text("Three")]}
    assert converted(document) == [["text", [text("One\n\nTwo"), image(0), text("Three")]], ["a.jpg"]]
    paired = {"images": ["a.jpg", None, "b.jpg"], "texts": [None, "Between.", None]}
    assert converted(paired) == [["text", [image(0), text("Between."), image(1)]], ["a.jpg", "b.jpg"]]


def test_swift_messages_consume_placeholders_in_order() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "<image>Where is the <ref-object>?"},
            {"role": "assistant", "content": "At <bbox>, not <bbox>."},
        ],
        "images": ["a.jpg"],
        "objects": {"ref": ["dog"], "bbox": [[1, 2, 30, 40], [5, 6]]},
    }
    box = {"type": "box", "image": 0, "box": [1, 2, 30, 40]}
    point = {"type": "point", "image": 0, "point": [5, 6]}
    assert converted(row) == [
        ["user", [image(0), text("Where is the dog?")]],
        ["assistant", [text("At "), box, text(", not "), point, text(".")]],
        ["a.jpg"],
    ]
    del row["objects"]  # without objects the same marks are ordinary text
    assert converted(row)[1][1] == [text("At <bbox>, not <bbox>.")]


def test_llava_and_openai_conversations() -> None:
    llava = {
        "id": "7", "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    }  # fmt: skip
    expected = [["user", [image(0), text("\nWhat?")]], ["assistant", [text("A cat.")]], ["a.jpg"]]
    assert converted(llava) == expected
    assert convert_row(llava, "x", "qa")[0].id == "7"
    content = [{"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}}, text("\nWhat?")]
    openai = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]}
    assert converted(openai) == expected
    placeholder_items = {
        "messages": [{"role": "user", "content": [{"type": "image"}, text("\nWhat?")]}, {"role": "assistant", "content": "A cat."}],
        "images": ["a.jpg"],
    }
    assert converted(placeholder_items) == expected
    inline = "data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8\xff").decode()
    content[0] = {"type": "image_url", "image_url": {"url": inline}}
    assert convert_row(openai, "x", "qa")[1][0].data == b"\xff\xd8\xff"


def test_preference_and_prompt_rows() -> None:
    row = {
        "messages": [{"role": "user", "content": "<image>Hi"}, {"role": "assistant", "content": "Good."}],
        "rejected_response": "Bad.", "images": ["a.jpg"], "licence": "MIT",
    }  # fmt: skip
    sample, _ = convert_row(row, "x", "preference")
    assert sample.metadata == {"licence": "MIT", "rejected": [text("Bad.")]}
    pair = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Good."}], "rejected": "Bad."}
    sample, _ = convert_row(pair, "x", "preference")
    assert [m["role"] for m in sample.messages] == ["user", "assistant"]
    prompt = {"messages": [{"role": "user", "content": "2 + 2?"}], "task": "counting", "solution": 4, "tolerance": 0}
    sample, _ = convert_row(prompt, "x", "prompt")
    assert sample.metadata == {"task": "counting", "solution": 4, "tolerance": 0}


def test_sampled_frames_are_a_video() -> None:
    def row(**video) -> dict:
        content = [{"type": "image", "image": "a.jpg"}, {"type": "video", **video}, text("What moves?")]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A ball."}]}

    found = converted(row(video=["0.jpg", "1.jpg", "2.jpg"], fps=2))
    assert found[0][1][1] == {"type": "video", "frames": [1, 2, 3], "timestamps": [0.0, 0.5, 1.0]}
    assert found[-1] == ["a.jpg", "0.jpg", "1.jpg", "2.jpg"]
    assert converted(row(frames=["0.jpg"], timestamps=[7]))[0][1][1]["timestamps"] == [7.0]
    assert refused(row(video=["0.jpg", "1.jpg"])) == "bad_row"
    assert refused(row(video=["0.jpg", "1.jpg"], timestamps=[2, 1])) == "bad_row"
    assert refused(row(video="film.mp4")) == "unsupported"


def test_special_tokens_in_text_stay_text() -> None:
    row = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "<|image_pad|>"}]}
    assert converted(row)[0][1] == [text("<|im_end|>")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "bad_row"),
        ({"answer": 1}, "unknown_convention"),
        ({"image": "a.jpg"}, "empty_text"),
        ({"image": "a.jpg", "text": "  "}, "empty_text"),
        ({"image": "http://x/a.jpg", "text": "t"}, "remote_image"),
        ({"image": 3, "text": "t"}, "bad_row"),
        ({"content": [{"type": "image", "image": "a.jpg"}]}, "empty_text"),
        ({"content": [{"type": "audio", "audio": "a.wav"}]}, "unsupported"),
        ({"messages": []}, "unknown_convention"),
        ({"messages": [{"role": "user", "content": "q"}]}, "empty_answer"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "empty_answer"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]}, "empty_answer"),
        ({"messages": [{"role": "robot", "content": "q"}]}, "bad_row"),
        ({"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]}, "placeholder_mismatch"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "images": ["a.jpg"]},
            "placeholder_mismatch",
        ),
        (
            {
                "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "<bbox> <bbox>"}],
                "images": ["a.jpg"],
                "objects": {"bbox": [[1, 2, 3, 4]]},
            },
            "placeholder_mismatch",
        ),
        (
            {
                "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "<bbox>"}],
                "images": ["a.jpg"],
                "objects": {"bbox": [[1, 2, float("nan"), 4]]},
            },
            "bad_coordinates",
        ),
        ({"images": ["a.jpg"], "texts": ["a", "b"]}, "placeholder_mismatch"),
    ],
)
def test_rows_that_are_refused(row: object, reason: str) -> None:
    assert refused(row) == reason


def test_coordinates_come_to_pixels_of_the_original() -> None:
    def messages(numbers: list, unit: str | None = None) -> list:
        item = {"type": "box", "image": 0, "box": numbers} | ({"unit": unit} if unit else {})
        return [{"role": "assistant", "content": [item]}]

    relative = messages([0, 100, 500, 1000], "norm1000")
    resolve_coordinates(relative, [(200, 50)])
    assert relative[0]["content"] == [{"type": "box", "image": 0, "box": [0.0, 5.0, 100.0, 50.0]}]
    for wrong in ([0, 0, 300, 10], [50, 0, 10, 10], [-5, 0, 10, 10]):
        with pytest.raises(Refusal, match="bad_coordinates"):
            resolve_coordinates(messages(wrong), [(200, 50)])
    resolve_coordinates(messages([0, 0, 200, 50]), [(200, 50)])
