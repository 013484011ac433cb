"""Every command in the README and the docs is one that exists, with options that exist, on files that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from terrace.command_reference import parsers, reference

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
# A line of code: inside a fence, or set in by four spaces.
COMMAND = re.compile(r"^(?: {4})?((?:terrace|make|python|ray|kubectl) [^`]*)$")
OURS = re.compile(r"\b(?:jobs|k8s|docs|operators|tests|platform)/[\w./-]+\.(?:yaml|py|md|Dockerfile)\b")


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        if page.name == "commands.md":
            continue
        lines = page.read_text(encoding="utf-8").replace("\\\n", " ").split("\n")
        for number, line in enumerate(lines, start=1):
            if (match := COMMAND.match(line)) and not line.startswith("terrace trains"):
                found.append((f"{page.name}:{number}", match[1]))
    return found


def test_the_docs_hold_commands():
    assert len(commands()) > 30


@pytest.mark.parametrize(("where", "line"), commands(), ids=lambda value: value.split(" ")[0] if ":" in value else "")
def test_a_command_parses(where: str, line: str):
    known = parsers()
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for part in re.split(r" \| | && ", line):
        words = shlex.split(part, comments=True)
        if words[0] == "make":
            for word in words[1:]:
                assert "=" in word or word in targets, f"{where}: no make target {word}"
        if words[0] == "terrace":
            assert words[1] in known, f"{where}: no command {words[1]}"
            # What a command refuses for good raises here: an option that does not exist, a missing argument.
            parsed, rest = known[words[1]].parse_known_args(words[2:])
            assert not [word for word in rest if "=" not in word], f"{where}: {rest}"
            assert parsed is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_repository_that_a_page_names_are_there(page: Path):
    named = set(OURS.findall(page.read_text(encoding="utf-8")))
    assert not [name for name in named if not (REPOSITORY / name).is_file()]


def test_commands_page_is_the_parsers_own():
    written = (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == reference(), "run `make docs`"
