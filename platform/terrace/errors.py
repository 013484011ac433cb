"""Errors with a meaning: what the user gave is wrong (exit status 2), the run was told to stop (143), or anything else (1)."""

from __future__ import annotations


class TerraceError(Exception):
    """An error with one clear line for the person who runs Terrace. `exit_status` is the process's."""

    exit_status = 1


class InputError(TerraceError):
    """The recipe, the data or the command line is wrong: running again cannot help, changing the input does."""

    exit_status = 2


class DamagedData(TerraceError):
    """Bytes of a sample do not match what the index says, or cannot be decoded."""


class Preempted(TerraceError):
    """The run was told to stop and has saved a checkpoint; starting it again continues from there."""

    exit_status = 143
