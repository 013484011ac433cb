"""Errors with a meaning: what the user gave is wrong (exit status 2), the run was told to stop (143), or anything else (1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TerraceError(Exception):
    """An error with one clear line for the person who runs Terrace. `exit_status` is the process's."""

    exit_status = 1


class InputError(TerraceError):
    """The recipe, the data or the command line is wrong: running again cannot help, changing the input does."""

    exit_status = 2


class DamagedData(TerraceError):
    """Bytes of a sample do not match what the index says, or cannot be decoded: they will not at the next try either."""

    exit_status = 2


class Preempted(TerraceError):
    """The run was told to stop and has saved a checkpoint; starting it again continues from there."""

    exit_status = 143


def one_line(message: str) -> str:
    """What a journal and a status keep of a message: its first line, and of several the next one, which is the first of the reasons."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()] or [""]
    if len(lines) == 1:
        return lines[0]
    return f"{lines[0].removesuffix(':')}: {lines[1]}" + " (`terrace logs RUN` shows the rest)" * (len(lines) > 2)


def nearest(word: str, choices: Iterable[str], limit: int = 8) -> str:
    """A hint that names the nearest valid word, or all of them when none is near and they are few. May be empty."""
    choices = list(choices)
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.55)
    if close:
        return f"; did you mean `{by_lower[close[0]]}`?"
    if choices and len(choices) <= limit:
        return f"; valid: {', '.join(choices)}"
    return ""
