"""What does not exist is refused before anything slow is loaded: one line, status 2, and neither torch nor Ray nor transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from terrace import cli

TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
LINES = [
    "init mine --from nowhere --data x", "chat nowhere", "serve nowhere", "export nowhere out", "run nowhere.yaml --run-dir r",
    "run rows.jsonl --run-dir r", "status nowhere", "report nowhere", "track nowhere --uri http://127.0.0.1:1", "logs nowhere",
    "resume nowhere", "cancel nowhere", "demo --data nowhere --run-dir r", "validate nowhere.yaml", "validate rows.jsonl",
    "plan nowhere.yaml", "order nowhere.yaml one", "inspect nowhere.jsonl --out p.html", "ingest nowhere.jsonl",
    "index nowhere.yaml", "evaluate nowhere mmbench:x.tsv", "recipes show nowhere", "duplicates nowhere.yaml",
]  # fmt: skip
SCRIPT = """
import contextlib, io, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "ray", "transformers"):
            raise AssertionError(f"{name} is loaded")

sys.meta_path.insert(0, Refuse())
from terrace import cli
for line in sys.argv[1:]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = cli.main(line.split())
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    print(status, len(said.getvalue().strip().splitlines()), line, "|", said.getvalue().strip().replace("\\n", " / "), sep="\\t")
"""


def test_wrong_names_are_refused_before_anything_slow_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    done = subprocess.run([sys.executable, "-c", SCRIPT, *LINES], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    answers = done.stdout.splitlines()
    assert len(answers) == len(LINES)
    assert [answer for answer in answers if not answer.startswith("2\t1\t")] == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl"], "nothing is left behind"
    assert all("`terrace init DIR --from CHECKPOINT --data rows.jsonl`" in answer for answer in answers if "\trun rows.jsonl" in answer)


def test_a_run_writes_nothing_before_everything_is_there_and_never_over_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What `validate` would say, with key and line; and a user's recipe that lies under the name of a run's own stays as it is."""
    recipe, rows = tmp_path / "mine" / "recipe.yaml", tmp_path / "rows.jsonl"
    recipe.parent.mkdir()
    rows.write_text('{"messages": []}\n')
    text = TINY.read_text().replace("data/", "../data/")
    recipe.write_text(text)
    line = 1 + next(at for at, words in enumerate(text.splitlines()) if "captions: {uri" in words)
    wrong = ["tokenizer=/nonexistent", "model.config.text_config.vocab_size=300"]
    assert cli.main(["run", str(recipe), "--run-dir", str(tmp_path / "run"), *wrong]) == 2
    said = capsys.readouterr().err
    assert "6 problems" in said
    assert f"recipe.yaml:{line}: data.sources.captions.uri: there is nothing at" in said
    assert "override `tokenizer=/nonexistent`: tokenizer.path: there is no tokenizer.json in /nonexistent" in said
    places = [f"data.sources.{name}.uri={rows}" for name in ("captions", "documents", "text", "instructions", "grounding")]
    for name in ("mine", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "recipe.yaml").write_text(text)
        assert cli.main(["run", str(recipe), "--run-dir", str(tmp_path / name), *places]) == 2
        assert f"{name}/recipe.yaml is a recipe of yours, and a run keeps its own under that name" in capsys.readouterr().err
        assert (tmp_path / name / "recipe.yaml").read_text() == text
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        "mine", "mine/recipe.yaml", "other", "other/recipe.yaml", "rows.jsonl",
    ]  # fmt: skip


def test_arguments_that_may_be_left_out_are_not_asked_for(capsys: pytest.CaptureFixture) -> None:
    for command in ("run", "validate", "plan", "order", "ingest", "inspect", "render", "duplicates", "recaption", "index"):
        assert cli.main([command]) == 2
        assert not {"key.path=value", "overrides"} & set(capsys.readouterr().err.split())
