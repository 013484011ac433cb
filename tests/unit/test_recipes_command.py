"""`terrace recipes`, short names wherever a recipe's file is named, and completion in a shell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from terrace.cli import COMMANDS, main
from terrace.completion import SHELLS, script
from terrace.data.look.inspect_command import split_target
from terrace.recipe import shipped
from terrace.recipe.errors import RecipeError
from terrace.recipe.loading import load_recipe


def test_list_show_and_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped.names()
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert all(len(line.split("  ")) >= 4 and line.split("  ")[-1] for line in lines), "a recipe without a description"
    assert main(["recipes", "show", "mimo-vl-7b"]) == 0
    assert capsys.readouterr().out == shipped.shipped_file("mimo-vl-7b").read_text()
    assert main(["recipes", "show", "mimo-vl-7b-rl", "--resolved"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert load_recipe("resolved.yaml") == load_recipe("mimo-vl-7b-rl")
    (tmp_path / "folder").mkdir()
    for words, written in (([], "mimo-vl-7b-rl.yaml"), (["new/mine.yaml"], "new/mine.yaml"), (["folder"], "folder/mimo-vl-7b-rl.yaml")):
        assert main(["recipes", "copy", "mimo-vl-7b-rl", *words]) == 0
        assert load_recipe(tmp_path / written) == load_recipe("mimo-vl-7b-rl")
    capsys.readouterr()
    for words, complaint in (
        (["copy", "mimo-vl-7b-rl"], "mimo-vl-7b-rl.yaml exists"),
        (["show", "mimo-vl-7"], "did you mean `mimo-vl-7b`?"),
        (["show"], "name the recipe"),
        (["show", "../tests/recipes/tiny"], "no recipe ../tests/recipes/tiny is shipped"),
        (["burn", "demo"], "invalid choice: 'burn'"),
    ):
        assert main(["recipes", *words]) == 2
        assert complaint in capsys.readouterr().err


def test_a_short_name_stands_where_a_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo", ["name=other"]).name == "other"
    (tmp_path / "mine.yaml").write_text("extends: mimo-vl-7b\nname: mine\n")
    assert load_recipe("mine.yaml").stages == load_recipe("mimo-vl-7b").stages
    assert split_target("demo:alignment") == (Path("demo"), "alignment")
    # What lies here under the name wins; a folder is no recipe.
    (tmp_path / "mimo-vl-7b").write_text("extends: demo\nname: here\n")
    (tmp_path / "demo").mkdir()
    assert load_recipe("mimo-vl-7b").name == "here"
    assert load_recipe("demo").name == "demo"
    assert split_target("demo") == (None, None)
    # Errors of a shipped recipe name its file; a word that is no recipe is answered with the nearest one.
    with pytest.raises(RecipeError, match="override"):
        load_recipe("qwen-vl-7b", ["stages.0.budget.steps=none"])
    with pytest.raises(RecipeError, match=r"cannot read the recipe mimo-vl-8b: .* did you mean `mimo-vl-7b`\?"):
        load_recipe("mimo-vl-8b")
    with pytest.raises(RecipeError, match=r"cannot read the recipe qwen-vl-7b\.yaml: No such file or directory$"):
        load_recipe("qwen-vl-7b.yaml")
    (tmp_path / "lost.yaml").write_text("extends: mimo-vl-8b\nname: lost\n")
    with pytest.raises(RecipeError, match=r"lost\.yaml:1.*mimo-vl-8b"):
        load_recipe("lost.yaml")


CASES = [
    ("terrace pla", {"plan"}),
    ("terrace plan mimo-vl-7b-", {"mimo-vl-7b-rl"}),
    ("terrace recipes cop", {"copy"}),
    ("terrace run demo --launcher k", {"kubernetes"}),
    ("terrace run demo --run-d", {"--run-dir"}),
    ("terrace validate ./mine", {"./mine.yaml"}),
]


def test_bash_completes_commands_options_choices_recipes_and_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    asked = [f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; _terrace; echo ${{COMPREPLY[@]}}" for line, _ in CASES]
    text = "\n".join([script("bash"), *asked])
    done = subprocess.run(["bash", "--norc", "-c", text], capture_output=True, text=True, cwd=tmp_path, timeout=30)
    assert not done.stderr
    assert [set(line.split()) for line in done.stdout.splitlines()] == [words for _, words in CASES]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_holds_every_command_and_parses(shell: str) -> None:
    text = script(shell)
    assert all(f"      {name}) words=" in text for name in COMMANDS)
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, timeout=30)
        assert not done.stderr
