"""Recipe files into `Recipe`: `extends`, overrides, and errors with file and line.

    recipe = load_recipe("jobs/recipes/demo.yaml", ["stages.alignment.budget.steps=5"])

A path that a file gives is meant from the file's own folder, where something lies there (`beside.py`).

Layers, later over earlier: the file that `extends:` names (relative to the extending file, or a shipped recipe's short name, any
depth), the file, the overrides. Maps merge, lists are replaced, except that `stages` may be a map of changes by stage name (and of further
stages, which come last). Validation is strict: a string is never read as a number nor a number as a boolean. All
problems are reported at once (RecipeError).
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from terrace.errors import nearest
from terrace.recipe import beside, document, shipped
from terrace.recipe.document import Entry
from terrace.recipe.errors import Path, Place, Problem, RecipeError, dotted
from terrace.recipe.schema import Recipe
from terrace.recipe.schema_inputs import is_plain_mixture

MAX_FILE_BYTES = 4 * 2**20
ROWS = (".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".tar")
FREE_FORM = {"config", "options"}  # maps whose values are passed on as they are


def load_recipe(path: FilePath | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path`, a file or a shipped recipe's short name, under `key.path=value` overrides.

    RecipeError names every problem with file and line.
    """
    return _validate(_entries(path, overrides), str(shipped.recipe_file(FilePath(path))))


def _entries(path: FilePath | str, overrides: Sequence[str]) -> Entry:
    root = _read_layers(shipped.recipe_file(FilePath(path)), [])
    for override in overrides:
        root = _apply_override(root, override)
    return root


def placed(problems: Sequence[Problem], path: FilePath | str, overrides: Sequence[str] = ()) -> list[Problem]:
    """Problems that were found later, each with the file and line of its key in the recipe at `path`."""
    root = _entries(path, overrides)
    return [Problem(problem.path, problem.message, _place(root, problem.path)) for problem in problems]


def parse_recipe(mapping: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """A recipe that is already a plain mapping (a Kubernetes resource, a test). The same checks, without lines."""
    return _validate(document.expand_shorthands(_entry_of(mapping, Place(name))), name)


def lines_in_use(path: FilePath | str) -> set[tuple[str, int]]:
    """(file, line) of every value that a recipe ends up with, of its own and of what it extends: what was replaced is not among them."""

    def walk(entry: Entry) -> Iterator[tuple[str, int]]:
        if entry.place.line is not None:
            yield entry.place.file, entry.place.line
        for inner in entry.value.values() if isinstance(entry.value, dict) else entry.value if isinstance(entry.value, list) else ():
            yield from walk(inner)

    return set(walk(_read_layers(shipped.recipe_file(FilePath(path)), [])))


def dump_recipe(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads back to an equal recipe: everything resolved, defaults written out."""
    return yaml.safe_dump(_shown(recipe), sort_keys=False, allow_unicode=True, width=120)


# ---------------------------------------------------------------- layers


def _read_layers(path: FilePath, chain: list[FilePath], named_by: Place | None = None) -> Entry:
    """The document at `path` over the documents it extends. `chain` holds the files on the way, to refuse cycles."""
    real = path.resolve()
    if real in chain:
        names = " -> ".join(file.name for file in [*chain[chain.index(real) :], real])
        raise RecipeError([Problem(("extends",), f"recipes extend each other in a circle: {names}", named_by)])
    text = _read_text(path, named_by)
    root = document.expand_shorthands(document.read_yaml(text, str(path)))
    if not isinstance(root.value, dict):
        raise RecipeError([Problem((), "a recipe is a map of keys (name, model, data, stages, ...)", root.place)])
    beside.found_beside(root, path.parent)
    extends = root.value.pop("extends", None)
    if extends is None:
        return root
    if not isinstance(extends.value, str) or not extends.value:
        takes = "takes one recipe: its path, relative to this file, or the short name of a shipped one"
        raise RecipeError([Problem(("extends",), takes, extends.place)])
    base = _read_layers(shipped.extended_file(path, extends.value), [*chain, real], extends.place)
    return document.merge(base, root)


def _read_text(path: FilePath, named_by: Place | None) -> str:
    """The text of a recipe file. A folder, a device, a pipe, a file of another size than recipes have: RecipeError, at once."""
    reason = ""
    try:
        if not path.exists():
            reason = f"No such file or directory{shipped.hint(path)}"
        elif path.is_dir():
            reason = "it is a folder; name the recipe file in it"
        elif not path.is_file():
            reason = "it is a device or a pipe, no file"
        elif path.suffix.lower() in ROWS:
            reason = f"by its name it holds rows, not a recipe; `terrace init DIR --from CHECKPOINT --data {path}` writes one for them"
        elif path.stat().st_size > MAX_FILE_BYTES:
            reason = f"it has {path.stat().st_size:,} bytes, more than any recipe ({MAX_FILE_BYTES:,})"
        else:
            return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text (byte {error.start})"
    raise RecipeError([Problem((), f"cannot read the recipe {path}: {reason}", named_by)])


def _apply_override(root: Entry, override: str) -> Entry:
    key, equals, text = override.partition("=")
    place = Place(f"override `{override}`")
    if not equals or not key.strip():
        raise RecipeError([Problem((), "an override has the form key.path=value", place)])
    value = document.read_value(text, place)
    path = _resolve(root, key.strip().split("."), place)
    if kept := _kept_keys(root, path, value):
        raise RecipeError([Problem(path, f"the map is merged with what stands there, so {kept}", place)])
    layer = value
    for step in reversed(path):
        layer = Entry({step: layer}, place)
    return _merge_at(root, document.expand_shorthands(layer), path, ())


# Maps of names that are chosen as a whole: whoever writes one of them on the command line means all of it.
WHOLE_MAPS = (("stages", "*", "train"), ("stages", "*", "mixture", "weights"))


def _kept_keys(root: Entry, path: Path, value: Entry) -> str:
    """What an override that gives such a map as a whole would leave standing, in words; empty: nothing."""
    path = (*path, "weights") if path[-1:] == ("mixture",) and is_plain_mixture(value.plain()) else path
    if not isinstance(value.value, dict) or not any(document.matches(path, pattern) for pattern in WHOLE_MAPS):
        return ""
    found, there = _walk(root, path)
    standing = [key for key, entry in there.value.items() if entry.value is not None] if isinstance(there.value, dict) else []
    kept = [key for key in standing if key not in value.value]
    if found != path or not kept:
        return ""
    key = dotted(path).removesuffix(".weights")
    one, gone = next(iter(value.value), "NAME"), ", ".join(f"{key}.{name}=null" for name in kept)
    return f"{', '.join(kept)} would stay: write {key}.{one}=... to change {one} alone, or add {gone}"


def _merge_at(root: Entry, layer: Entry, path: Path, done: Path) -> Entry:
    """Merges an override's nested map, stepping into lists by index. At the path's end maps merge, else replace."""
    if path and isinstance(root.value, list):
        index = path[0]
        items = list(root.value)
        items[index] = _merge_at(items[index], layer.value[index], path[1:], (*done, index))
        return Entry(items, root.place)
    if len(path) > 1 and isinstance(root.value, dict) and path[0] in root.value:
        step = path[0]
        return Entry({**root.value, step: _merge_at(root.value[step], layer.value[step], path[1:], (*done, step))}, root.place)
    merged = document.merge(root, layer, done)
    return Entry(merged.value, root.place)


def _resolve(root: Entry, words: list[str], place: Place) -> Path:
    """Steps of a dotted key: list items by index or stage name, names that contain dots, plain mixtures."""
    path: list[str | int] = []
    current: Entry | None = root
    while words:
        if current is not None and isinstance(current.value, list):
            index, taken = _list_item(current, words, path, place)
            path.append(index)
            current = current.value[index]
        else:
            known = current.value if current is not None and isinstance(current.value, dict) else {}
            if path[-1:] == ["mixture"] and words[0] not in document.MIXTURE_KEYS:
                path.append("weights")
                weights = known.get("weights")
                known = weights.value if weights is not None and isinstance(weights.value, dict) else {}
            taken = next((n for n in range(len(words), 0, -1) if ".".join(words[:n]) in known), 1)
            path.append(".".join(words[:taken]))
            current = known.get(path[-1])
        words = words[taken:]
    return tuple(path)


def _list_item(entry: Entry, words: list[str], path: list[str | int], place: Place) -> tuple[int, int]:
    """(index, words used) of a list item named by `words`."""
    names = [document.stage_name(item) for item in entry.value]
    for taken in range(len(words), 0, -1):
        if (name := ".".join(words[:taken])) in names:
            return names.index(name), taken
    if words[0].isdigit() and int(words[0]) < len(entry.value):
        return int(words[0]), 1
    named = [str(name) for name in names if name]
    hint = nearest(words[0], named) if named else ""
    message = f"no item `{words[0]}`; there are {len(entry.value)}, counted from 0{hint}"
    raise RecipeError([Problem(tuple(path), message, place)])


# ---------------------------------------------------------------- validation


def _validate(root: Entry, name: str) -> Recipe:
    from terrace.recipe import rules

    try:
        recipe = Recipe.model_validate_json(json.dumps(_whole_numbers(root.plain())), strict=True)
    except ValidationError as error:
        raise RecipeError(_problems(error, root), name) from None
    if problems := [Problem(problem.path, problem.message, _place(root, problem.path)) for problem in rules.check(recipe)]:
        raise RecipeError(problems, name)
    return recipe


def _whole_numbers(value: Any) -> Any:
    """300e9 may be an integer: strict validation takes integers for floats but not the reverse."""
    if isinstance(value, dict):
        return {key: item if key in FREE_FORM else _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _walk(root: Entry, path: Sequence[str | int]) -> tuple[Path, Entry]:
    """The deepest entry along a pydantic location; its extra words (union members, `[key]`) name nothing here."""
    found: list[str | int] = []
    current = root
    for step in path:
        here = current.value
        in_list = isinstance(here, list) and isinstance(step, int) and step < len(here)
        if not in_list and not (isinstance(here, dict) and step in here):
            break
        current = here[step]
        found.append(step)
    return tuple(found), current


def _place(root: Entry, path: Path) -> Place:
    return _walk(root, path)[1].place


def _problems(error: ValidationError, root: Entry) -> list[Problem]:
    problems: dict[Path, Problem] = {}
    for item in error.errors(include_url=False, include_context=True):
        path, entry = _walk(root, item["loc"])
        if item["type"] == "missing":
            message = f"`{item['loc'][-1]}` is missing"
            key: Path = (*path, item["loc"][-1])
        else:
            message, key = _message(item, path, entry), path
        if key in problems and item["type"] != "missing":  # one value tried against the members of a union
            message = f"{problems[key].message}, or {message}"
        problems[key] = Problem(path, message, entry.place)
    return sorted(problems.values(), key=lambda problem: (str(problem.place.file), problem.place.line or 0))


def _message(item: Mapping[str, Any], path: Path, entry: Entry) -> str:
    if item["type"] == "extra_forbidden":
        model = _model_at(path[:-1])
        return "unknown key" + (nearest(str(path[-1]), model.model_fields) if model else "")
    written = entry.plain()
    if item["type"] == "literal_error" and isinstance(written, str):
        choices = [choice.strip(" '") for choice in item["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"`{written}` is not one of {', '.join(choices)}" + (nearest(written, choices, limit=0))
    text = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    text = text.replace("valid dictionary or object to extract fields from", "map of keys").replace("an object", "a map of keys")
    shown = json.dumps(written, ensure_ascii=False, default=str)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'}: {text}"


def _model_at(path: Path) -> type[BaseModel] | None:
    """The schema's model of the map at `path`, for the nearest valid key."""
    kind: Any = Recipe
    for step in path:
        model = _model_in(kind)
        if model is not None:
            if step not in model.model_fields:
                return None
            kind = model.model_fields[step].annotation
        else:  # a list's item or a named entry of a map: the last type argument that holds a model
            kind = next((item for item in reversed(_arguments(kind)) if _model_in(item) or _arguments(item)), None)
    return _model_in(kind)


def _model_in(kind: Any) -> type[BaseModel] | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    if typing.get_origin(kind) in (list, dict, tuple):
        return None
    return next((found for item in _arguments(kind) if (found := _model_in(item))), None)


def _arguments(kind: Any) -> tuple[Any, ...]:
    return tuple(item for item in typing.get_args(kind) if item is not type(None))


# ---------------------------------------------------------------- plain values


def _entry_of(value: Any, place: Place) -> Entry:
    if isinstance(value, Mapping):
        return Entry({str(key): _entry_of(item, place) for key, item in value.items()}, place)
    if isinstance(value, (list, tuple)):
        return Entry([_entry_of(item, place) for item in value], place)
    if isinstance(value, BaseModel):
        return _entry_of(value.model_dump(mode="json"), place)
    return Entry(value, place)


def _shown(model: BaseModel) -> dict[str, Any]:
    """A model as plain YAML values, without the nulls that are the default anyway."""
    shown: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if value is None and field.default is None:
            continue
        shown[name] = _plain(value)
    return shown


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _shown(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
