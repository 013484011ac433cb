"""The recipes that come with Terrace, by their short names: `mimo-vl-7b` is the file of that name without `.yaml`.

They are `jobs/recipes/*.yaml` of the source tree, which setup.py puts into the wheel as files of this package. Wherever a
recipe's file is named (a command, `extends`), its short name does as well; a file of the same name in the working directory wins.
"""

from __future__ import annotations

from pathlib import Path

from terrace.errors import nearest

INSTALLED = Path(__file__).with_name("shipped")
SOURCE_TREE = Path(__file__).resolve().parents[3] / "jobs" / "recipes"
SUFFIX = ".yaml"


def folder() -> Path:
    """Where the shipped recipes lie: inside the installed package, or in the source tree that it is run from."""
    return INSTALLED if INSTALLED.is_dir() else SOURCE_TREE


def names() -> list[str]:
    """The short names, sorted."""
    return sorted(path.name.removesuffix(SUFFIX) for path in folder().glob(f"*{SUFFIX}"))


def shipped_file(name: str) -> Path | None:
    """The file of a short name; None if no recipe is shipped under it."""
    if "/" in name or name.startswith("."):
        return None
    path = folder() / f"{name}{SUFFIX}"
    return path if path.is_file() else None


def recipe_file(path: Path) -> Path:
    """`path` itself where it is a file or looks like one, else the shipped recipe that it names."""
    return path if path.is_file() else shipped_file(str(path)) or path


def extended_file(path: Path, written: str) -> Path:
    """The file that the recipe in `path` names in `extends`: beside it, or shipped under that short name."""
    beside = path.parent / written
    return beside if beside.is_file() else shipped_file(written) or beside


def hint(path: Path) -> str:
    """What to add to the error about a recipe that is not there: the nearest short name, where one may have been meant."""
    word = str(path)
    if "/" in word or path.suffix in (SUFFIX, ".yml"):
        return ""
    return f", and no recipe of that name is shipped{nearest(word, names())} (`terrace recipes list`)"
