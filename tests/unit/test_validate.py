"""`terrace validate` finds every mistake: what is not there, what cannot be read, what is hardly meant; `terrace ingest` takes rows."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import yaml
from newcomer_world import write_checkpoint, write_rows

from terrace.cli import main
from terrace.curriculum.validate_inputs import missing_inputs
from terrace.recipe.loading import load_recipe
from terrace.recipe.questions import questions

TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A recipe with its rows and its checkpoint beside it, all named by relative paths."""
    folder = tmp_path_factory.mktemp("validate")
    write_rows(folder / "data", rows=6)
    write_checkpoint(folder / "checkpoint")
    stage = {
        "name": "sft", "train": {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}, "mixture": {"rows": 1.0}, "budget": {"steps": 3},
        "sequence_length": 512, "pixels": {"min": 784, "max": 12544}, "precision": "fp32",
    }  # fmt: skip
    recipe = {
        "name": "mine", "model": {"pretrained": "checkpoint"}, "tokenizer": "checkpoint",
        "data": {"sources": {"rows": {"uri": "data", "kind": "instruction"}}}, "stages": [stage],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def told(capsys, *given: str) -> tuple[int, str, str]:
    status = main(["validate", *map(str, given)])
    out, err = capsys.readouterr()
    return status, out, err


def test_paths_are_relative_to_the_recipe_and_everything_is_there(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = told(capsys, world / "recipe.yaml")
    assert (status, err) == (0, "")
    assert "mine is valid: 1 stage\n" in out
    recipe = load_recipe(world / "recipe.yaml")
    assert recipe.data.sources["rows"].uri == str(world / "data")
    assert recipe.model.pretrained == recipe.tokenizer.path == str(world / "checkpoint")
    (tmp_path / "base.yaml").write_text(f"extends: {world / 'recipe.yaml'}\nname: other\n")
    assert load_recipe(tmp_path / "base.yaml").data.sources["rows"].uri == str(world / "data")
    # What does not lie beside the recipe is meant from the current folder, as it is on the command line.
    assert load_recipe(world / "recipe.yaml", ["data.sources.rows.uri=data"]).data.sources["rows"].uri == "data"
    # A run's own resolved recipe stays as it is: the run's data folder lies beside it.
    (world / "run" / "data").mkdir(parents=True)
    (world / "run" / "journal.jsonl").touch()
    (world / "run" / "recipe.yaml").write_text((world / "recipe.yaml").read_text())
    assert load_recipe(world / "run" / "recipe.yaml").data.sources["rows"].uri == "data"


def test_a_folder_that_recaptioning_will_write_need_not_be_there(world):
    given = ["data.sources.rows.kind=caption", "recaption={better: {source: rows, captioner: checkpoint, out: later}}"]
    recipe = load_recipe(world / "recipe.yaml", given)
    assert not (world / "later").exists()
    assert missing_inputs(recipe) == []


def test_every_file_that_is_not_there_is_named_at_once(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    (world / "empty").mkdir(exist_ok=True)
    wrong = ["data.sources.rows.uri=nothing/*.jsonl", "tokenizer=Qwen/Qwen2.5-VL-7B-Instruct", "model.pretrained=empty",
             "stages.0.evaluate.suites=[mmbench:none.tsv]", "data.sources.more={uri: empty, kind: text}"]  # fmt: skip
    status, _, err = told(capsys, "recipe.yaml", *wrong)
    assert status == 2
    assert "5 problems" in err
    for words in ("there is nothing at nothing/*.jsonl", "hf download Qwen/Qwen2.5-VL-7B-Instruct", "no config.json in empty",
                  "nothing at none.tsv", "data.sources.more.uri: there is nothing at empty"):  # fmt: skip
        assert words in err
    assert told(capsys, "recipe.yaml", "--offline", *wrong)[0] == 0
    line = next(number for number, text in enumerate(Path("recipe.yaml").read_text().splitlines(), 1) if "uri:" in text)
    os.rename("data", "moved")
    try:
        assert f"recipe.yaml:{line}: data.sources.rows.uri" in told(capsys, "recipe.yaml")[2]
    finally:
        os.rename("moved", "data")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sources.rows.uri=gs://bucket/rows", "gs:// is not read here"),
        ("data.sources.rows.uri=https://host/rows.jsonl", "https:// is not read here"),
        ("model.pretrained=hf://Qwen/Qwen2", "hf download"),
        ("tokenizer=ftp://host/x", "ftp:// is not read here"),
        ("stages.0.evaluate.suites=[mmbench:gs://bucket/x.tsv]", "gs:// is not read here"),
        ("stages.0.train={projector: {lr: 1e-3}}", "language would stay"),
        ("stages.0.mixture={other: 1}", "rows would stay"),
    ],
)
def test_what_no_run_could_use_is_refused_without_looking(world, capsys, override, words):
    status, _, err = told(capsys, world / "recipe.yaml", "--offline", override)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1


def test_a_bucket_that_does_not_answer_is_one_line(world, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}.items():
        monkeypatch.setenv(name, value)
    endpoint = f"data.storage.endpoint_url=http://127.0.0.1:{port}"
    sources = ["data.sources.rows.uri=s3://b/x", "data.sources.more={uri: s3://b/y, kind: text}"]
    status, _, err = told(capsys, world / "recipe.yaml", endpoint, *sources)
    assert status == 2
    assert "--offline" in err.splitlines()[-1]
    assert err.count("cannot be looked at") == 1


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([], []),
        (["stages.0.train.language.lr=1e308"], ["stages.0.train.language.lr"]),
        (["stages.0.train.language.lr=1e-12"], ["stages.0.train.language.lr"]),
        (["stages.0.train.language.lr=4.8"], ["stages.0.train.language.lr"]),
        (["stages.0.train.language.lr=4.8", "stages.0.optimizer={kind: lars}"], []),
        (["stages.0.budget={steps: 1e12}"], ["stages.0.budget.steps"]),
        (["stages.0.budget={epochs: 1e9}", "stages.0.batch.packs=1e9"], ["stages.0.budget.epochs", "stages.0.batch.packs"]),
        (["stages.0.optimizer={weight_decay: 50, eps: 0.1}"], ["stages.0.optimizer.weight_decay", "stages.0.optimizer.eps"]),
        (["stages.0.mixture={rows: 1, more: 1e9}", "data.sources.more={uri: s3://b/x, kind: caption}"], ["stages.0.mixture.weights.rows"]),
    ],
)
def test_absurd_magnitudes_are_questions(world, overrides, keys):
    found = questions(load_recipe(world / "recipe.yaml", overrides))
    assert [".".join(map(str, question.path)) for question in found] == keys


def test_shipped_recipes_raise_no_question():
    for file in sorted((TINY.parents[2] / "jobs" / "recipes").glob("*.yaml")):
        assert not [str(question) for question in questions(load_recipe(file))], file.name


def test_questions_are_printed_and_are_no_errors(world, capsys):
    status, out, _ = told(capsys, world / "recipe.yaml", "stages.0.train.language.lr=1e308")
    assert status == 0
    assert "question: override `stages.0.train.language.lr=1e308`: stages.0.train.language.lr: is 1e+308 meant?" in out
    status, out, _ = told(capsys, world / "recipe.yaml", "--json", "stages.0.train.language.lr=1e308")
    assert len(json.loads(out)["questions"]) == 1


def test_ingest_takes_rows(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ingest", str(world / "data" / "colours.json"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["source"], report["samples"], report["refused"]) == ("colours", 6, {})
    assert report["folder"].startswith(str(tmp_path / "colours-shards"))
    assert main(["ingest", str(world / "data"), "--out", "here"]) == 0
    assert "6 samples" in capsys.readouterr().out
    assert main(["ingest", str(world / "data" / "colours.json"), "stages.0.seed=1"]) == 2
    assert "go with a recipe" in capsys.readouterr().err


NO_FILES = [["validate", "{0}"], ["validate", "/dev/full"], ["plan", "/dev/zero"], ["run", "{0}/pipe", "--run-dir", "{0}/r"]]


@pytest.mark.parametrize("given", NO_FILES)
def test_what_is_no_recipe_file_is_one_line_at_once(tmp_path, capsys, given):
    os.mkfifo(tmp_path / "pipe")
    assert main([word.format(tmp_path) for word in given]) == 2
    err = capsys.readouterr().err
    assert "cannot read the recipe" in err
    assert err.count("\n") == 1


def test_a_huge_file_is_no_recipe(tmp_path, capsys):
    with open(tmp_path / "huge.yaml", "wb") as file:
        file.truncate(2**33)
    assert main(["validate", str(tmp_path / "huge.yaml")]) == 2
    assert "more than any recipe" in capsys.readouterr().err
