"""The pages for users of other trainers: their commands run, their keys are the schema's. Training ones are in tests/e2e."""

from __future__ import annotations

import re
import shlex
import typing
from pathlib import Path

import pytest
from newcomer_world import write_checkpoint, write_rows
from pydantic import BaseModel

from terrace.cli import COMMANDS, main
from terrace.recipe.schema import Recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("from-llama-factory.md", "from-ms-swift.md")
TRAINS = ("run", "chat", "report", "status", "serve")  # these and what follows them: tests/e2e/test_newcomer.py


def commands_of(page: str) -> list[list[str]]:
    """The commands of the page's bash blocks."""
    text = (DOCS / page).read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_rows(folder / "data", rows=20)
    write_checkpoint(folder / "checkpoints" / "mine")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    done = []
    for program, name, *rest in commands_of(page):
        assert program == "terrace"
        assert name in COMMANDS
        if name not in TRAINS:
            assert main([name, *rest, *(["--force"] if name == "init" else [])]) == 0, (name, capsys.readouterr().err)
            done.append(name)
    assert {"init", "validate", "ingest", "plan"} <= set(done)


@pytest.mark.parametrize("page", PAGES)
def test_the_keys_of_a_page_are_the_schemas(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.split("## Options")[1].splitlines() if line.startswith("| `")]
    named = [key for row in rows for key in re.findall(r"`([^`]+)`", row[2]) if not key.startswith("--") and key != "terrace run"]
    assert len(named) > 25
    assert not [key for key in named if not _is_key(Recipe, key.replace("NAME.", "").split("."))]


def _is_key(model: object, path: list[str]) -> bool:
    """Whether a dotted path leads to a field, through lists, maps and optional sections."""
    if not path:
        return True
    for found in _models(model):
        if path[0] in found.model_fields:
            return _is_key(found.model_fields[path[0]].annotation, path[1:])
    return False


def _models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]
