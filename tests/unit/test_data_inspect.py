"""`terrace inspect`: the page shows what training reads, whatever the source, and shows it safely."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import s3_server

from terrace import cli
from terrace.data.images import decode_image, resize_image
from terrace.data.look.inspect_command import split_target
from terrace.data.look.inspect_page import histogram, inspection_page
from terrace.data.look.samples import Inspection, inspect_stage, token_pieces
from terrace.data.order.plan import StagePlan
from terrace.data.prepare import PreparedData, prepare_data
from terrace.data.stream.tasks import TaskSettings, make_pack, pack_task
from terrace.recipe.schema import Recipe, Storage
from terrace.storage.s3 import s3

HOSTILE = "a <script>alert(1)</script> & <|im_end|> \u0007 \u202e 你好 🙂"


def picture(width: int, height: int, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of captions (one of them refused), of boxes and points, and of a text longer than a pack."""
    folder = tmp_path_factory.mktemp("rows")
    for number, size in enumerate([(100, 60), (300, 200), (64, 64)]):
        (folder / f"{number}.png").write_bytes(picture(*size, seed=number))
    boxes = [
        {
            "messages": [
                {"role": "user", "content": "<image>Is <bbox> a cat? Point at it."},
                {"role": "assistant", "content": "It is <bbox>, <point>"},
            ],
            "images": ["1.png"],
            "objects": {"ref": [], "bbox": [[30, 40, 150, 160], [10, 20, 299, 199]], "point": [[77, 33]]},
        },
        {"content": [{"type": "video", "video": ["0.png", "1.png", "2.png"], "fps": 1}, {"type": "text", "text": "moves"}]},
    ]
    captions = [{"image": f"{n % 3}.png", "text": f"caption {n} {HOSTILE}"} for n in range(8)] + [{"image": "gone.png", "text": "x"}]
    texts = [{"text": "line of text\n" * 200}, {"text": "short"}]
    for name, found in {"captions": captions, "boxes": boxes, "texts": texts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture(scope="module")
def stage(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, PreparedData, Inspection]:
    sources = {name: {"uri": str(rows / f"{name}.jsonl")} for name in ("captions", "boxes")}
    sources["texts"] = {"uri": str(rows / "texts.jsonl"), "kind": "text", "too_long": "split"}
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"config": {}},
            "tokenizer": {"train_vocabulary_size": 400},
            "data": {"sources": sources},
            "stages": [
                {
                    "name": "one", "train": {"projector": {"lr": 1e-3}}, "mixture": {"weights": dict.fromkeys(sources, 1.0)},
                    "sequence_length": 512, "pixels": {"min": 784, "max": 50_176}, "budget": {"epochs": 1}, "batch": {"packs": 2},
                }
            ],
        }
    )  # fmt: skip
    prepared = prepare_data(recipe, tmp_path_factory.mktemp("run"), use_ray=False)
    return recipe, prepared, inspect_stage(recipe, 0, prepared, samples=9, packs=50)


def said_of(segment) -> str:
    """What the loss has targets for."""
    return "".join(piece for run in segment.runs if run.supervised for piece in run.pieces)


def test_packs_are_those_of_training(stage) -> None:
    recipe, prepared, found = stage
    plan = StagePlan.build(recipe, 0, prepared)
    settings = TaskSettings.of(recipe, 0, prepared)
    trained = [make_pack(part, settings) for part in pack_task(plan.packs(0, plan.total_packs), settings).parts]
    assert len(found.packs) == len(trained) > 2
    for shown, pack in zip(found.packs, trained):
        assert [segment.id for segment in shown.segments] == pack.sample_ids
        assert [segment.start + segment.tokens for segment in shown.segments] == pack.segment_ends.tolist()
        assert sum(segment.supervised_tokens for segment in shown.segments) == pack.supervised_tokens
        assert shown.tokens == sum(run.tokens for segment in shown.segments for run in segment.runs) == pack.tokens
        said = sum(run.tokens for segment in shown.segments for run in segment.runs if run.supervised)
        assert said == pack.supervised_tokens
        if (pack.image_rows == pack.image_facts.prod(axis=1)).all():  # no videos
            assert sum(part.pixels.size for segment in shown.segments for part in segment.pictures) == pack.pixels.size
    notes = [note for pack in found.packs for segment in pack.segments for note in segment.notes]
    assert any(note.startswith("tokens 0 to ") for note in notes)  # of the text that was split


def test_boxes_stand_where_the_text_says_and_pictures_are_the_resized_ones(stage, rows: Path) -> None:
    found = stage[2]
    [segment] = [one for one in found.samples if one.source == "boxes" and len(one.pictures) == 1]
    [shown] = segment.pictures
    height, width, _ = shown.pixels.shape
    assert np.array_equal(shown.pixels, resize_image(decode_image((rows / "1.png").read_bytes()), height, width))
    assert {(mark.answer, len(mark.values)) for mark in shown.marks} == {(False, 4), (True, 4), (True, 2)}
    for mark in shown.marks:
        runs = [run for run in segment.runs if f"[{', '.join(map(str, mark.values))}]" in "".join(run.pieces)]
        assert [run.supervised for run in runs] == [mark.answer]
    assert next(mark for mark in shown.marks if len(mark.values) == 2).values == (round(77 * width / 300), round(33 * height / 200))
    box, point = (next(list(mark.values) for mark in shown.marks if mark.answer and len(mark.values) == count) for count in (4, 2))
    assert said_of(segment) == f"It is {box}, {point}<|im_end|>"
    for caption in (one for one in found.samples if one.source == "captions"):
        assert re.fullmatch(r"caption \d a <script>.*<\|endoftext\|>", said_of(caption), re.DOTALL)
    [chip] = [run for run in segment.runs if run.kind == "image"]
    assert chip.grid[1:] == (height // 28, width // 28)
    assert chip.tokens == height * width // 784


def test_frames_of_a_video_come_apart_again(stage, rows: Path) -> None:
    [segment] = [one for one in stage[2].samples if one.source == "boxes" and len(one.pictures) == 3]
    assert [shown.number for shown in segment.pictures] == [0, 1, 2]
    for shown in segment.pictures:
        height, width, _ = shown.pixels.shape
        assert np.array_equal(shown.pixels, resize_image(decode_image((rows / f"{shown.number}.png").read_bytes()), height, width))


def test_the_page_holds_everything_and_nothing_runs(stage) -> None:
    found = stage[2]
    page = inspection_page(found, "one <b>", "of & tiny", ["a note"])
    assert "one &lt;b&gt;" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "\u0007" not in page
    pictures = sum(len(s.pictures) for s in [*found.samples, *(s for pack in found.packs for s in pack.segments)])
    assert page.count("data:image/jpeg;base64,") == pictures > 10
    supervised = "".join(re.findall(r"<ins>(.*?)</ins>", page, re.DOTALL))
    assert HOSTILE.replace("\u0007", "\u2407") in html.unescape(re.sub(r"<[^>]+>", "", supervised))
    assert re.search(r"image 1 (\d+)×(\d+) = (\d+) tokens", page)
    assert "missing_image" in page
    assert "gone.png" in page
    assert page.count('<article id="pack-0-') == len(found.packs[0].segments)
    assert page.count("1 too long, split") == 2  # in the table of shares, and above the source's lengths
    for source in found.sources:
        assert f"{len(source.lengths):,}" in page


@pytest.mark.parametrize("largest", [1, 30, 5_000, 1_000_000])
def test_a_histogram_counts_every_sample_once(largest: int) -> None:
    values = np.random.default_rng(largest).integers(0, largest, 500)
    values[0] = largest * 3  # far beyond the rest
    drawn = histogram(values, "tokens", "#123456", 512)
    assert sum(int(count.replace(",", "")) for count in re.findall(r": ([\d,]+)</title>", drawn)) == 500
    assert f"{largest * 3:,}" in drawn


def test_tokens_of_one_character_stay_together(stage) -> None:
    tokenizer = stage[1].tokenizer()
    for text in (HOSTILE, "🙂", "a\ufffdb", "e\u0301"):
        ids = tokenizer.encode(text)
        pieces = token_pieces(ids, tokenizer)
        assert "".join(pieces) == tokenizer.decode(ids)
    assert token_pieces(tokenizer.encode("🙂🙂"), tokenizer) in (["🙂", "🙂"], ["🙂🙂"])


def test_targets() -> None:
    assert split_target("a/b.yaml:one") == (Path("a/b.yaml"), "one")
    assert split_target("b.yml:") == (Path("b.yml"), None)
    assert split_target("b.yaml") == (Path("b.yaml"), None)
    assert split_target("s3://bucket/rows") == (None, None)
    assert split_target("rows.jsonl") == (None, None)


def test_a_source_from_a_folder_and_from_s3(rows: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    common = ["--samples", "5", "--pixels", "50176", "--kind", "caption", "--name", "captions"]
    assert cli.main(["inspect", str(rows / "captions.jsonl"), "--out", str(tmp_path / "local.html"), *common]) == 0
    assert "samples 5, packs 1" in capsys.readouterr().out
    with s3_server.serve_s3() as server:
        for name, value in s3_server.ACCESS.items():
            monkeypatch.setenv(name, value)
        filesystem = s3(Storage(endpoint_url=server.url))
        filesystem.mkdir("inspected")
        for file in [*rows.glob("*.png"), rows / "captions.jsonl"]:
            filesystem.put(str(file), f"inspected/rows/{file.name}")
        uri = "s3://inspected/rows/captions.jsonl"
        assert cli.main(["inspect", uri, "--endpoint-url", server.url, "--out", str(tmp_path / "remote.html"), *common]) == 0
    local, remote = ((tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in ("local", "remote"))
    assert remote.replace("s3://inspected/rows", str(rows)) == local


def test_a_stage_and_its_data_by_the_command(rows: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    tiny = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "tiny.yaml").read_text())
    tiny["data"] = {"sources": {"captions": {"uri": str(rows / "captions.jsonl")}}}
    tiny["stages"] = tiny["stages"][:1]
    recipe.write_text(yaml.safe_dump(tiny))
    two = {**tiny, "stages": [*tiny["stages"], {**tiny["stages"][0], "name": "second"}]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    out = tmp_path / "page.html"
    run = ["--run-dir", str(tmp_path / "run"), "--out", str(out)]
    assert cli.main(["inspect", f"{recipe}:projector-warmup", *run, "--packs", "2", "stages.0.sequence_length=128"]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.count('<section class="pack">') == 2
    assert "packs of 128 tokens" in page
    capsys.readouterr()
    for target, *more, told in [
        (f"{recipe}:two", "no stage 'two'"),
        (f"{tmp_path}/two.yaml", "stages of recipe tiny are projector-warmup, second"),
        (f"{recipe}:projector-warmup", "--pixels", "784", "--pixels goes with a source"),
        (f"{tmp_path}/gone.yaml:one", "gone.yaml"),
        (f"{tmp_path}/gone.jsonl", "no file at"),
        (f"{rows}/texts.jsonl", "stages.0.seed=1", "go with a recipe"),
        (f"{rows}/texts.jsonl", "--kind", "frog", "kind"),
        (f"{rows}/texts.jsonl", "--pixels", "9,3", "--pixels 9,3"),
        (f"{rows}/texts.jsonl", "--tokenizer", f"{tmp_path}/none", "tokenizer"),
        (f"{rows}/texts.jsonl", "--packs", "-1", "start at 0"),
    ]:
        assert cli.main(["inspect", target, *run[2:], *more] if "yaml" not in target else ["inspect", target, *run, *more]) == 2
        message = capsys.readouterr().err.strip().splitlines()
        assert told in message[-1], message


def test_a_damaged_sample_is_shown_with_its_damage(rows: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    command = ["inspect", str(rows / "captions.jsonl"), "--data-dir", str(data), "--out", str(tmp_path / "page.html"), "--samples", "8"]
    assert cli.main(command) == 0
    assert "Damaged" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    [shard] = data.rglob("*.tar")
    content = bytearray(shard.read_bytes())
    place = content.index(b"IDAT") + 20
    content[place] ^= 255
    shard.write_bytes(content)
    assert cli.main(command) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Damaged: " in page
    assert shard.name in page


def test_prompts_end_where_the_answer_begins(rows: Path, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "<image>How many?"}]
    row = {"messages": question, "images": ["0.png"], "task": "counting", "solution": "3"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    shutil.copy(rows / "0.png", tmp_path)
    out = tmp_path / "page.html"
    assert cli.main(["inspect", str(tmp_path / "rows.jsonl"), "--kind", "prompt", "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", "", page.split('<div class="text">')[1].split("</div>")[0]))
    assert text.endswith("<|im_start|>assistant↵\n")
    assert "0 supervised" in page


@pytest.mark.slow
def test_the_page_in_a_browser(stage, tmp_path: Path) -> None:
    browser = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome on this machine")
    (tmp_path / "page.html").write_text(inspection_page(stage[2], "one", "tiny"), encoding="utf-8")
    common = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--hide-scrollbars", "--window-size=500,6000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    found = subprocess.run(
        [*common, f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in found.stderr
    shot = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    # Every supervised text lies on its tint, and the pictures of noise are there: many colours beside the page's few.
    assert (np.abs(shot - [0xD9, 0xF2, 0xE8]).max(axis=2) < 4).sum() > 1000
    assert len(np.unique(shot.reshape(-1, 3) // 8, axis=0)) > 2000
