"""A tiny model that is talked to: streamed answers are those of plain decoding, with pictures, turns, limits and the command."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from families import case_of, model_of, picture
from single_answers import answer, load_speaker

from terrace.cli import main
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.models.export import export_hf
from terrace.talk.conversation import Turn
from terrace.talk.model_place import model_directory
from terrace.talk.talker import Wishes, open_talker

IMAGE = picture(120, 80)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk")
    case = case_of("qwen2_5_vl", folder / "tokenizer")
    model = model_of(case, 0.3)
    final = folder / "runs" / "mine" / "stages" / "02-sft" / "final"
    final.parent.mkdir(parents=True)
    export_hf({name: value.detach() for name, value in model.named_parameters()}, case.config, case.tokenizer.directory, final, case.pixels)
    (folder / "picture.png").write_bytes(IMAGE)
    return folder / "runs" / "mine"


@pytest.fixture(scope="module")
def talker(run_dir):
    return open_talker(model_directory(run_dir))


def test_streamed_answers_are_those_of_plain_decoding(talker, run_dir):
    """Two turns with pictures in both, against a decoder of another make."""
    turns = [Turn("user", (IMAGE, "How many circles?")), Turn("assistant", ("3",)), Turn("user", (IMAGE, "And squares?"))]
    pieces = []
    prompt = talker.prompt(turns)
    said = talker.answer(prompt, Wishes(max_tokens=24), lambda _, text: pieces.append(text))
    text = {"type": "text", "text": "How many circles?"}
    sample = Sample("s", "prompt", [
        {"role": "user", "content": [{"type": "image", "image": 0}, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        {"role": "user", "content": [{"type": "image", "image": 1}, {"type": "text", "text": "And squares?"}]},
    ])  # fmt: skip
    speaker = load_speaker(model_directory(run_dir))
    reference = answer(speaker, sample, [IMAGE, IMAGE], 24)
    assert "".join(pieces) == said.answers[0].text
    assert said.answers[0].text.strip() == reference.text
    assert said.answers[0].text
    assert said.answers[0].finished == reference.finished
    assert said.prompt_tokens == len(prompt.input_ids)

    # A stop word ends it where it stands; several samples differ; the same seed says the same again.
    word = said.answers[0].text[3:6]
    assert talker.answer(prompt, Wishes(max_tokens=24, stop=(word,))).answers[0].text == said.answers[0].text.split(word)[0]
    several = [one.text for one in talker.answer(prompt, Wishes(8, temperature=1.5, seed=7, answers=4)).answers]
    assert len(set(several)) > 1
    assert several == [one.text for one in talker.answer(prompt, Wishes(8, temperature=1.5, seed=7, answers=4)).answers]
    gone = talker.answer(prompt, Wishes(max_tokens=24), gone=lambda: True)
    assert gone.answers[0].tokens == 0


def test_what_cannot_be_asked_is_said(talker):
    with pytest.raises(InputError, match="cannot be used"):
        talker.prompt([Turn("user", (b"no picture", "What?"))])
    with pytest.raises(InputError, match="the model takes 4096"):
        talker.room(talker.prompt([Turn("user", ("word " * 5000,))]))


def test_the_command_answers_lines_of_a_pipe_and_keeps_the_conversation(run_dir, talker, monkeypatch, capsys):
    monkeypatch.setattr("terrace.talk.talker.open_talker", lambda *given: talker)
    image = run_dir.parent.parent / "picture.png"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"How many?\n\n/image {image}\nAnd here?\n/history\n/new\n/history\n"))
    assert main(["chat", str(run_dir), "--image", str(image), "--max-new-tokens", "4", "--system", "Be short."]) == 0
    told = capsys.readouterr().out
    history = told[told.index("system: ") :].splitlines()
    assert history[0] == "system: Be short."
    assert history[1] == "user: [picture]How many?"
    assert "user: [picture]And here?" in told
    assert history[-1] == "system: Be short."
    first = talker.answer(talker.prompt([Turn("system", ("Be short.",)), Turn("user", (IMAGE, "How many?"))]), Wishes(4))
    assert told.startswith(first.answers[0].text + "\n")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["{}/nothing"], "no such folder"),
        (["s3://bucket/runs/mine"], "copy the stage's final/ here"),
        (["{}/picture.png"], "no folder"),
        (["{}/runs"], "no config.json"),
        (["{}/runs/mine", "--image", "{}/none.png"], "no such file"),
        (["{}/runs/mine", "--image", "{}/text.png"], "not an image"),
        (["{}/runs/mine", "--pixels", "9", "4"], "9 is more than 4"),
        (["{}/runs/mine", "--temperature", "3"], "from 0 to 2"),
    ],
)
def test_wrong_command_lines(run_dir, given, words, capsys):
    folder = run_dir.parent.parent
    (folder / "text.png").write_text("no picture")
    assert main(["chat", *(word.format(folder) for word in given), "--ask", "x"]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_serving_to_others_wants_a_key_and_a_taken_port_is_said_at_once(run_dir, monkeypatch, capsys):
    import socket

    monkeypatch.delenv("TERRACE_API_KEY", raising=False)
    assert main(["serve", str(run_dir), "--host", "0.0.0.0"]) == 2
    assert "TERRACE_API_KEY" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(run_dir), "--port", str(taken.getsockname()[1])]) == 2
    assert "--port" in capsys.readouterr().err


def test_bf16_files_are_read_as_float32_where_that_is_asked(run_dir, tmp_path):
    """`final/` in a stage's precision: half the bytes, the same names, and the answer of the rounded weights."""
    case = case_of("qwen2_5_vl", run_dir.parent.parent / "tokenizer")
    state = {name: value.detach() for name, value in model_of(case, 0.3).named_parameters()}
    half = export_hf(state, case.config, case.tokenizer.directory, tmp_path / "half", case.pixels, "bfloat16", torch.bfloat16)
    whole = model_directory(run_dir)
    assert (half / "model.safetensors").stat().st_size < 0.55 * (whole / "model.safetensors").stat().st_size
    rounded = {name: value.to(torch.bfloat16).float() for name, value in state.items()}
    again = export_hf(rounded, case.config, case.tokenizer.directory, tmp_path / "rounded", case.pixels)
    turns = [Turn("user", (IMAGE, "How many circles?"))]
    texts = []
    for directory in (half, again):
        one = open_talker(directory, precision="fp32")
        texts.append(one.answer(one.prompt(turns), Wishes(max_tokens=16)).answers[0].text)
    assert texts[0] == texts[1]


def test_a_model_leaves_its_run_in_another_number_format(run_dir, tmp_path, capsys):
    """What `terrace export` writes is what a stage of that format would have written, and transformers opens it."""
    import json

    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    whole = model_directory(run_dir)
    (whole / "adapter").mkdir(exist_ok=True)
    (whole / "adapter" / "adapter_config.json").write_text("{}")
    assert main(["export", str(run_dir), str(tmp_path / "same")]) == 0
    assert {file.name: file.read_bytes() for file in whole.iterdir() if file.is_file()} == {
        file.name: file.read_bytes() for file in (tmp_path / "same").iterdir() if file.is_file()
    }
    assert (tmp_path / "same" / "adapter" / "adapter_config.json").is_file()
    assert main(["export", str(run_dir), str(tmp_path / "half"), "--stage", "sft", "--precision", "bf16"]) == 0
    before, after = load_file(whole / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in before)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "half")
    assert opened.dtype == torch.bfloat16
    assert main(["export", str(tmp_path / "half"), str(tmp_path / "again"), "--precision", "fp32"]) == 0
    assert all(torch.equal(value, after[name].float()) for name, value in load_file(tmp_path / "again" / "model.safetensors").items())
    capsys.readouterr()
    for arguments, words in (
        ([str(run_dir), str(tmp_path / "half")], "is there already"),
        ([str(run_dir), str(tmp_path / "x"), "--stage", "morl"], "no stage morl among 02-sft"),
        ([str(run_dir), str(whole / "x")], "lies inside"),
        ([str(run_dir), str(tmp_path / "x"), "--format", "gguf"], "convert_hf_to_gguf.py"),
        ([str(run_dir), str(tmp_path / "x"), "--format", "awq"], "llm-compressor"),
        ([str(run_dir), str(tmp_path / "x"), "--format", "onnx"], "hf is written here"),
        ([str(tmp_path), str(tmp_path / "x")], "no config.json"),
    ):
        assert main(["export", *arguments]) == 2, arguments
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob(".*.partial"))
