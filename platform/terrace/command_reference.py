"""Writes docs/commands.md from the parsers themselves: `python -m terrace.command_reference docs/commands.md`."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

from terrace.cli import COMMANDS, GROUPS

HEAD = """# Commands

Written from the commands' own `--help`. Every command takes `--debug`, which adds a trace to an error. Exit status: 0 done, 2 the input is
wrong, 143 stopped on request with a checkpoint, 1 anything else. Arguments of the form `key.path=value` change a recipe's fields.
"""


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every subcommand's parser, by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for module in dict.fromkeys(module for module, _ in COMMANDS.values()):
        subparsers = argparse.ArgumentParser(prog="terrace").add_subparsers()
        importlib.import_module(module).register(subparsers)
        found.update({name: parser for name, parser in subparsers.choices.items() if COMMANDS.get(name, ("",))[0] == module})
    return found


def reference() -> str:
    """The page as Markdown."""
    by_name, lines = parsers(), [HEAD]
    for group, names in GROUPS.items():
        lines.append(f"\n## {group}\n")
        for name in names:
            parser = by_name[name]
            lines += [f"### `terrace {name}`\n", f"{parser.description or COMMANDS[name][1]}\n"]
            lines += ["| argument | meaning |", "|---|---|", *_rows(parser)]
            if parser.epilog:
                lines += ["", _text(parser.epilog)]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _rows(parser: argparse.ArgumentParser) -> list[str]:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        value = _value(action)
        names = ", ".join(f"`{option}{' ' + value if value else ''}`" for option in action.option_strings) or f"`{value}`"
        rows.append(f"| {names} | {_text((action.help or '') % {'default': action.default})} |")
    return rows


def _value(action: argparse.Action) -> str:
    """What stands for the argument's value; '' for a switch."""
    if action.nargs == 0:
        return ""
    word = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if isinstance(word, tuple):
        return " ".join(word)
    if action.choices is not None and action.metavar is None:
        word = "{" + ",".join(map(str, action.choices)) + "}"
    many = {"*": f"[{word} ...]", "+": f"{word} ...", "?": f"[{word}]"}
    return many.get(str(action.nargs), " ".join([word] * action.nargs) if isinstance(action.nargs, int) else word)


def _text(text: str) -> str:
    """One line, with what would end a table cell or open a tag made harmless."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").strip()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
