"""Inputs collected from public bug reports, where they lie beside the checkout: each gives what it should, by name.

`read`: the samples as one line each; `refused`: the reasons; `told`: what some sentence about a refused row says.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_reading import FAMILY, Reading

from terrace.data.images import decode_image
from terrace.data.order.eligible import Fitting
from terrace.data.order.stored import stored_source
from terrace.data.template import Encoded, encode_sample
from terrace.data.tokenizer import load_tokenizer
from terrace.recipe.schema import Source

PIXELS = (3136, 401_408)
CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "data"
RED = "<0>x y"
KEYS = (
    "image images image_path img_path file_name filename filepath file path img image_file image_url url picture jpg photo Image IMAGE"
    " image_name media source_image image_bytes"
)  # fmt: skip


def case(read: list[str] | None = None, refused: list[str] | None = None, told: str = "", **fields: Any) -> dict[str, Any]:
    return {"read": read or [], "refused": refused or [], "told": told, "fields": fields}


EXPECTED = {
    "alpaca": case(["user: <0>Name the colour.| assistant: Red"]),
    "b64-newlines": case([RED]),
    "b64-no-prefix": case([RED]),
    "both-image-and-image_path-files": case(["<0>A red square"]),
    "box-norm1-undeclared": case(refused=["bad_coordinates"], told="looks like a share of the image; say `bbox_type: norm1`"),
    "box-zero-area": case(refused=["bad_coordinates"], told="has no area"),
    "bytes-as-base64-string": case(refused=["truncated_image"]),
    "bytes-buffer-dict": case([RED], ["missing_image"]),
    "caption-with-image-tag": case(["<0>\nA red square."]),
    "cauldron-texts": case(["user: <0>Colour?| assistant: Red"]),
    "content-text-nontype": case(
        [f"user: {said}| assistant: b" for said in ("a", "plain string", "a", "a", "a<0>")], ["bad_row"],
        "a content item of type text without `text`",
    ),
    "default-id-collision": case(["<0>two", "<0>one"]),
    "demo-objects-json-string": case(["user: <0>Find cup| assistant: [1, 2, 30, 40]"], kind="grounding"),
    "demo-unicode-file-name": case([f"<0>A red square number {number}." for number in range(12)]),
    "dup-ids-llava": case(
        [f"user: <0>\n{said}" for said in ("Colour?| assistant: Red", "Describe.| assistant: A plain red area.",
                                           "Why?| assistant: Somebody painted it.")]
    ),
    "empty-image-string": case(["user: Hi| assistant: Hello"]),
    "exif-rotated-box": case(["user: <0>Where?| assistant: [50, 100, 150, 200]", "user: <0>Where?| assistant: [50, 350, 150, 440]"]),
    "folder-bom-caption": case(["<0>A red square."]),
    "folder-csv-unquoted-comma": case(refused=["bad_row", "empty_text"], told="the row has 3 fields, the header 2"),
    "folder-dangling-symlink": case(["<0>A red square."], ["empty_text"]),
    "folder-dangling-symlink-jsonl": case([RED]),
    "folder-json-with-number": case(["x y"], ["bad_row"], r"count.json.*holds one int, not rows"),
    "folder-latin1-caption": case(refused=["bad_row"], told="a.txt is not UTF-8"),
    "folder-mixed-formats": case(["from parquet", "<0>caption 0", "<0>caption 1", "<0>caption 2"]),
    "folder-symlink-loop": case(["x y"]),
    "image-folder-metadata-per-split": case(["<0>TEST caption", "<0>TRAIN caption"]),
    "image-literal-no-images": case(refused=["placeholder_mismatch"], told="to write the tag itself"),
    "index-in-content": case(["user: <1>second, then first: <0>| assistant: x"]),
    "json-holding-jsonl": case(["<0>caption 0", "<0>caption 1", "<0>caption 2"]),
    "json-number": case(refused=["bad_row"]),
    "jsonl-holding-array": case(["<0>caption 0", "<0>caption 1", "<0>caption 2"]),
    "kto-label": case(refused=["unwanted_answer"]),
    "llamafactory-ranking": case(["user: <0>Colour?| assistant: Red"]),
    "llava-media-keys": case(refused=["placeholder_mismatch", "unsupported", "unsupported"]),
    "no-image-but-kind-caption": case(refused=["missing_image"] * 3),
    "ocr-rows": case(["<0>line 1\nline 2", "<0>x"]),
    "png-16bit-low-range": case(["<0>A bright ramp."]),
    "png-wrong-checksum": case(refused=["truncated_image"], told="checksum of the PNG's IDAT chunk is wrong"),
    "pq-answer-bytes": case(["x y"]),
    "pq-answer-datetime": case(["x y", "z w"]),
    "pq-answer-decimal": case(["x y"]),
    "pq-corrupt-body": case([r"re:[0-9a-f]{60,}"] * 1000, ["unreadable_shard"], "row group 0 of rows.parquet cannot be read, 1000 of"),
    "pq-hf-image": case(["<0>one", "<0>two"], ["missing_image"]),
    "pq-image-bytes-and-image_path": case(["<0>A red square"]),
    "pq-image-bytes-and-image_path-conv": case(["user: <0>\nC?| assistant: Red"]),
    "pq-messages-json-string": case(["user: Hi| assistant: Hello"]),
    "pq-one-of-two-truncated": case(["x y"] * 10, ["unreadable_shard"], "b.parquet"),
    "pq-rowgroup1": case([f"row {number}" for number in range(400)]),
    "qwenvl1-img-tag": case(refused=["unsupported"], told="<img>file</img>"),
    "ref-as-string": case(["user: <0>Where is the cat?| assistant: [10, 10, 50, 50]"]),
    "ref-int": case(refused=["bad_row"]),
    "rejected-placeholders-literal": case(refused=["unsupported"], told="the rejected reply holds a placeholder"),
    "rl-verl": case(["user: <0>Find x."]),
    "row-level-system-tools": case(
        ["system: Answer in French.| user: Sky?| assistant: Bleu"] * 2, ["unknown_field", "bad_row", "bad_row"], "instruction"
    ),
    "same-id-in-two-files": case(["x y", "other sample with the same id"]),
    "tar-bom-txt": case(["<0>A red square."]),
    "tar-concatenated": case(["<0>First.", "<0>Second."]),
    "tar-cut-before-caption": case(["<0>First."], ["unreadable_shard"] * 2, "has no end mark"),
    "tar-dunder-members": case(["<0>cap"]),
    "tar-empty-txt-json-caption": case(["<0>From json", "<0>ok caption"]),
    "tar-hardlink-image": case(["<0>A red square.", "<0>The same red square again."]),
    "tar-json-list-of-numbers": case(["<0>Second."], ["bad_row"]),
    "tar-mask-beside": case(refused=["unknown_field"], told="0001.seg.png"),
    "tar-no-image": case(["<0>ok"], ["missing_image"]),
    "tar-not-adjacent": case(refused=["empty_text", "empty_text", "split_sample", "split_sample"], told="the members of `0001` lie apart"),
    "tar-openclip-two-suffix": case(["<0>ok caption"], ["unknown_field"], r"found s0.input.jpg, s0.outputs.txt"),
    "tar-readme-member": case(["<0>cap"], ["not_a_sample", "not_a_sample"], "LICENSE.txt"),
    "tar-sparse-gnu": case(["<0>Red."], ["unsupported"], "sparse"),
    "tar-terrace-key": case(["<0>ok caption"], ["unknown_field"]),
    "tar-unknown-image-ext": case(["<0>A jfif.", "<0>Upper case."], ["unknown_field", "unknown_field"], "0002.heic"),
    "tar-video-mp4": case(["<0>ok caption"], ["unknown_field"], "0001.mp4"),
    "text-empty-caption-present": case(["<0>A red square."]),
    "tiff-orientation-box": case(["user: <0>Where?| assistant: [50, 100, 150, 200]"], ["bad_coordinates"]),
    "trl-dpo-vlm": case(["user: <0>Colour?| assistant: Red"]),
    "trl-prompt-completion": case(["user: <0>Colour?| assistant: Red", "user: 2+2?| assistant: 4"]),
    "unknown-image-keys": case([f"<0>caption via {key}" for key in KEYS.split()]),
    "video-ts-inf": case(["ok row"], ["bad_row"], "times of a video's frames must rise"),
    "videos-column-ignored": case(refused=["unsupported"], told="a video file .'clip.mp4'. is not decoded"),
    "weight-zero": case([r"re:user: .*assistant\(masked\): .*assistant: .*"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path):
    return load_tokenizer(shared_data / "tokenizers" / "qwen2")


def read_case(name: str, tmp_path: Path, tokenizer: Any, **fields: Any) -> Reading:
    """The case's input, copied so that links can be made, read as its README says."""
    if not (CASES / name).is_dir():
        pytest.skip("no folder of collected inputs (shared/cases) beside the checkout")
    said = (CASES / name / "README").read_text(encoding="utf-8")
    shutil.copytree(CASES / name, tmp_path / "in", symlinks=True)
    for folder in [tmp_path / "in", *(path for path in (tmp_path / "in").rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
    for target, link in re.findall(r"ln -s (\S+) (\S+)", said):
        (tmp_path / "in" / link).symlink_to(target)
    kind = re.search(r"--kind (\w+)", said)
    place = re.search(r"Input: (.+?)\. Command", said)
    assert place is not None
    return Reading(tmp_path / "in" / place[1], tmp_path / "out", tokenizer, **{"kind": kind[1] if kind else "caption", **fields})


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_case(name: str, tmp_path: Path, tokenizer) -> None:
    expected = EXPECTED[name]
    found = read_case(name, tmp_path, tokenizer, **expected["fields"])
    assert len(found.words) == len(expected["read"]), found.told
    for line, wanted in zip(found.words, expected["read"]):
        assert re.fullmatch(wanted[3:], line, re.DOTALL) if wanted.startswith("re:") else line == wanted
    assert found.reasons == expected["refused"]
    assert re.search(expected["told"], found.told)


def test_every_case_has_its_expectation(shared_data: Path) -> None:
    if CASES.is_dir():
        assert {path.name for path in CASES.iterdir()} == set(EXPECTED) | ELSEWHERE


ELSEWHERE = {"ends-with-user", "special-box-tokens", "tool-calls-dropped", "tool-calls-null-content", "truncate-leaves-no-target"}


def encoded(found: Reading, row: int, tokenizer: Any) -> Encoded:
    """A sample as training encodes it; the index knows its length."""
    sample, index = found.samples[row], found.index
    made = encode_sample(sample, index.sizes(row), tokenizer, FAMILY, PIXELS)
    assert len(made.input_ids) == index.lengths(PIXELS)[row]
    assert made.supervised.sum() == index.supervised_tokens[row]
    return made


def learnt(found: Reading, row: int, tokenizer: Any) -> str:
    made = encoded(found, row, tokenizer)
    return tokenizer.decode(made.input_ids[made.supervised])


def test_a_conversation_that_ends_in_a_question_is_learnt_up_to_there(tmp_path: Path, tokenizer) -> None:
    found = read_case("ends-with-user", tmp_path, tokenizer)
    assert found.refused == []
    for row in range(len(found.samples)):
        assert learnt(found, row, tokenizer) == f"It is {2 * row}.<|im_end|>"
    assert tokenizer.decode(encoded(found, 7, tokenizer).input_ids).endswith("what about the rest?<|im_end|>\n")


def test_tool_calls_are_learnt_with_the_answer(tmp_path: Path, tokenizer) -> None:
    found = read_case("tool-calls-dropped", tmp_path / "dropped", tokenizer)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert learnt(found, 0, tokenizer) == "I will look it up.\n" + call
    found = read_case("tool-calls-null-content", tmp_path / "null", tokenizer)
    assert learnt(found, 0, tokenizer) == call + "It is 18 C<|im_end|>"
    assert "<|im_start|>user\n<tool_response>\n18 C\n</tool_response><|im_end|>" in tokenizer.decode(encoded(found, 0, tokenizer).input_ids)


def test_box_tokens_are_a_setting(tmp_path: Path, tokenizer) -> None:
    letters = read_case("special-box-tokens", tmp_path / "letters", tokenizer)
    tokens = read_case("special-box-tokens", tmp_path / "tokens", tokenizer, special_tokens="tokens")
    assert letters.report.spelled == tokens.report.spelled == 1
    others = int(letters.index.visual_tokens(PIXELS)[0]) - 1
    assert len(encoded(letters, 0, tokenizer).input_ids) - others == 63
    assert len(encoded(tokens, 0, tokenizer).input_ids) - others == 45  # as transformers' tokenizer counts


def test_a_sample_that_loses_its_last_target_is_refused_and_counted(tmp_path: Path, tokenizer) -> None:
    found = read_case("truncate-leaves-no-target", tmp_path, tokenizer, kind="qa", too_long="truncate_text")
    assert found.refused == []
    longest = int(found.index.lengths(PIXELS).max())
    rows = len(found.samples)
    for length, kept in ((longest // 2, 0), (longest + 1, rows)):
        source = Source(uri="x", kind="qa", too_long="truncate_text")
        made = stored_source("s", source, found.index, Fitting(PIXELS, length, None, needs_targets=True))
        assert made.count == kept
        assert made.changes == ({"no_target": rows} if kept == 0 else {})


def test_sixteen_bit_picture_is_bright(tmp_path: Path, tokenizer) -> None:
    found = read_case("png-16bit-low-range", tmp_path, tokenizer)
    assert decode_image(found.images[0][0]).max() == 255


def test_exif_is_counted_and_can_be_ignored(tmp_path: Path, tokenizer) -> None:
    found = read_case("exif-rotated-box", tmp_path, tokenizer)
    assert found.report.rotated == 2
    lying = read_case("exif-rotated-box", tmp_path / "again", tokenizer, exif="ignore")
    assert lying.index.sizes(0) == [(size[1], size[0]) for size in found.index.sizes(0)]
    assert lying.reasons == ["bad_coordinates"]  # a box of the upright picture
    tiff = read_case("tiff-orientation-box", tmp_path / "tiff", tokenizer, exif="ignore")
    assert tiff.words == ["user: <0>Where?| assistant: [300, 100, 440, 200]", "user: <0>Where?| assistant: [50, 100, 150, 200]"]


def test_small_row_groups_are_one_shard(tmp_path: Path, tokenizer) -> None:
    assert len(read_case("pq-rowgroup1", tmp_path, tokenizer).report.shards) == 1


def test_each_picture_belongs_to_its_own_folder(tmp_path: Path, tokenizer) -> None:
    found = read_case("image-folder-metadata-per-split", tmp_path, tokenizer)
    assert [images[0] for images in found.images] == [(tmp_path / "in" / "d" / part / "0.png").read_bytes() for part in ("test", "train")]


def test_ids_stay_apart(tmp_path: Path, tokenizer) -> None:
    for name in ("dup-ids-llava", "same-id-in-two-files", "default-id-collision"):
        found = read_case(name, tmp_path / name, tokenizer)
        assert len({sample.id for sample in found.samples}) == len(found.samples)
