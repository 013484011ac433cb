"""No secret in a recipe: it is copied into the run directory, into the tracking server's parameters, into reports and messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from terrace.recipe.credentials import credentials_problem
from terrace.recipe.errors import Path, Problem
from terrace.recipe.schema import Recipe


def check(recipe: Recipe) -> Iterator[Problem]:
    """A problem for each value, at any depth, that carries credentials in a URI. The message never repeats the value."""
    for path, text in _strings(recipe.model_dump(mode="json", exclude_none=True), ()):
        if problem := credentials_problem(text):
            yield Problem(path, problem)


def _strings(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _strings(item, (*path, number))
    elif isinstance(value, str):
        yield path, value
