"""What is wrong with a recipe: every problem at once, each with its file and line (or override) and a way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from terrace.errors import InputError
from terrace.recipe.credentials import redacted

Path = tuple[str | int, ...]  # ("stages", 0, "budget", "steps")


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or an override on the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `path` is the key's place in the recipe, `place` its place in the file where known."""

    path: Path
    message: str
    place: Place | None = None

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        key = f"{dotted(self.path)}: " if self.path else ""
        return f"{where}{key}{self.message}"


class RecipeError(InputError):
    """The recipe cannot run as written. The first line of the message stands alone; then one line per problem."""

    def __init__(self, problems: Sequence[Problem], recipe: str = "recipe") -> None:
        self.problems = list(problems)
        if len(self.problems) == 1:
            super().__init__(redacted(str(self.problems[0])))
        else:
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            super().__init__(f"{recipe}: {len(self.problems)} problems\n{redacted(lines)}")


def dotted(path: Path) -> str:
    """`("stages", 0, "budget")` -> `stages.0.budget`, as one would write it in an override."""
    return ".".join(str(step) for step in path)
