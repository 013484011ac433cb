"""YAML read into values that remember the file and line they came from, and merged in layers.

A recipe is a stack of layers: the file that `extends` names, the file itself, then the overrides. Python's yaml module
throws positions away and follows YAML 1.1, where `300e9` is a string, `on` a boolean and `12:30` the number 750. So
scalars here follow the YAML 1.2 core schema (plus `_` inside numbers), and duplicate keys are refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from terrace.recipe.errors import Path, Place, Problem, RecipeError
from terrace.recipe.schema_inputs import is_plain_mixture

INTEGER = re.compile(r"[-+]?[0-9][0-9_]*$|0o[0-7]+$|0x[0-9a-fA-F]+$")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$")
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # that no YAML file may hold
CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")
}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where the wheel has it: ten times as fast
MAX_NODES = 200_000  # far above any recipe; stops a file whose aliases multiply ("billion laughs")
PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
MAX_DEPTH = 64  # of maps and lists in one another
MAX_DIGITS = 64  # of a number

# Of these keys one is chosen: a later layer that sets one of them drops the others of the layers below.
ALTERNATIVES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("stages", "*", "budget"): ("steps", "tokens", "samples", "epochs"),
    ("model",): ("config", "pretrained"),
    ("stages", "*", "model"): ("config", "pretrained"),
    ("tokenizer",): ("path", "train_vocabulary_size"),
}
# In these maps of names a null removes the name that a lower layer gave.
NAMED_MAPS: tuple[tuple[str, ...], ...] = (
    ("data", "sources"),
    ("stages", "*", "mixture", "weights"),
    ("stages", "*", "mixture", "epoch_caps"),
    ("stages", "*", "rewards"),
    ("planning", "source_tokens_per_sample"),
)
NEW_STAGE_KEYS = ("train", "mixture", "budget")  # what every stage gives, and hardly a change of a stage all at once
MIXTURE_KEYS = ("weights", "unit", "temperature", "epoch_caps")


@dataclass
class Entry:
    """A value and where it was written. `value` is a scalar, a list of entries or a map of entries."""

    value: Any
    place: Place

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value


def read_yaml(text: str, file: str) -> Entry:
    """The one document in `text`. Raises RecipeError for broken YAML, duplicate keys and tags."""
    if unwritable := _UNWRITABLE.search(text):
        line = text.count("\n", 0, unwritable.start()) + 1
        raise RecipeError([Problem((), f"not valid YAML: it holds the character U+{ord(unwritable[0]):04X}", Place(file, line))])
    try:
        _check_depth(text, file)
        node = yaml.compose(text, Loader=LOADER)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise RecipeError([Problem((), f"not valid YAML: {error.problem or error}", Place(file, line))]) from None
    except yaml.YAMLError as error:
        raise RecipeError([Problem((), f"not valid YAML: {str(error).splitlines()[0]}", Place(file))]) from None
    if node is None:
        return Entry({}, Place(file, 1))
    reader = _Reader(file)
    entry = reader.entry(node)
    if reader.problems:
        raise RecipeError(reader.problems, file)
    return entry


def _check_depth(text: str, file: str) -> None:
    """Raise RecipeError where maps and lists are nested deeper than any recipe's: what reads them here calls itself."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                place = Place(file, event.start_mark.line + 1)
                raise RecipeError([Problem((), f"maps and lists are nested more than {MAX_DEPTH} deep", place)])
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def read_value(text: str, place: Place) -> Entry:
    """The value of an override, read as in a file: `[64, 128]`, `{min: 3136}`, `1e-4`, `true` and `null` work."""
    entry = read_yaml(text, str(place)) if text.strip() else Entry(None, place)

    def at_place(part: Entry) -> Entry:
        if isinstance(part.value, dict):
            return Entry({key: at_place(item) for key, item in part.value.items()}, place)
        if isinstance(part.value, list):
            return Entry([at_place(item) for item in part.value], place)
        return Entry(part.value, place)

    return at_place(entry)


class _Reader:
    """Builds entries from yaml nodes and collects what is wrong on the way."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.open: set[int] = set()
        self.nodes = 0

    def entry(self, node: yaml.Node, place: Place | None = None) -> Entry:
        place = place or Place(self.file, node.start_mark.line + 1)
        self.nodes += 1
        if self.nodes > MAX_NODES or id(node) in self.open:
            raise RecipeError([Problem((), "aliases that contain themselves or multiply without end", place)])
        if isinstance(node, yaml.ScalarNode):
            return Entry(self.scalar(node, place), place)
        if node.tag not in PLAIN_TAGS:
            self.problems.append(Problem((), f"YAML tag {node.tag} is not used in recipes", place))
        self.open.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            value: Any = [self.entry(item) for item in node.value]
        else:
            value = self.mapping(node)
        self.open.discard(id(node))
        return Entry(value, place)

    def mapping(self, node: yaml.MappingNode) -> dict[str, Entry]:
        result: dict[str, Entry] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            place = Place(self.file, key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.startswith("!"):
                self.problems.append(Problem((), "a key must be a plain word", place))
            elif key_node.tag == "tag:yaml.org,2002:merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            elif key_node.value in result:
                first = result[key_node.value].place.line
                self.problems.append(Problem((), f"key `{key_node.value}` is given twice, first on line {first}", place))
            else:
                result[key_node.value] = self.entry(value_node, place)
        for base in merged:
            if isinstance(base, yaml.MappingNode):
                self.nodes += len(base.value)
                if self.nodes > MAX_NODES or id(base) in self.open:
                    place = Place(self.file, node.start_mark.line + 1)
                    raise RecipeError([Problem((), "`<<` merges a map into itself", place)])
                self.open.add(id(base))
                for key, entry in self.mapping(base).items():
                    result.setdefault(key, entry)
                self.open.discard(id(base))
            else:
                place = Place(self.file, base.start_mark.line + 1)
                self.problems.append(Problem((), "`<<` takes a map or a list of maps", place))
        return result

    def scalar(self, node: yaml.ScalarNode, place: Place) -> Any:
        text = node.value
        if unwritable := _UNWRITABLE.search(text):
            self.problems.append(Problem((), f"a text holds the character U+{ord(unwritable[0]):04X}", place))
            return text.replace(unwritable[0], "")
        if node.style:  # quoted or a block: text, whatever it looks like
            return text
        if node.tag.startswith("!"):
            self.problems.append(Problem((), f"YAML tag {node.tag} is not used in recipes", place))
            return text
        if text in CONSTANTS:
            return CONSTANTS[text]
        if len(text) > MAX_DIGITS and (INTEGER.match(text) or FLOAT.match(text)):
            self.problems.append(Problem((), f"a number of {len(text):,} characters is none that a recipe needs", place))
            return 0
        if INTEGER.match(text):
            digits = text.replace("_", "")
            return int(digits, 0) if digits.startswith(("0x", "0o")) else int(digits)
        if FLOAT.match(text):
            number = float(text.replace("_", ""))
            if not math.isfinite(number):
                self.problems.append(Problem((), f"{text} is larger than any number", place))
            return number
        return text


# ---------------------------------------------------------------- layers


def matches(path: Path, pattern: tuple[str, ...]) -> bool:
    return len(path) == len(pattern) and all(wanted in ("*", step) for step, wanted in zip(path, pattern))


def merge(base: Entry, layer: Entry, path: Path = ()) -> Entry:
    """`layer` over `base`: maps are merged key by key, everything else is replaced.

    `stages` given as a map `{name: {...}}` changes the base's stages by name, and a complete stage of another name comes
    after them. Of exclusive keys the layer's wins.
    """
    if path == ("stages",) and isinstance(base.value, list) and isinstance(layer.value, dict):
        return _merge_stages(base, layer)
    if not (isinstance(base.value, dict) and isinstance(layer.value, dict)):
        return layer
    result = dict(base.value)
    for pattern, keys in ALTERNATIVES.items():
        if matches(path, pattern) and any(key in layer.value and layer.value[key].value is not None for key in keys):
            for key in keys:
                if not _continues(base, layer, key):
                    result.pop(key, None)
    removable = any(matches(path, pattern) for pattern in NAMED_MAPS)
    for key, entry in layer.value.items():
        if removable and entry.value is None and key in result:
            del result[key]
        else:
            result[key] = merge(result[key], entry, (*path, key)) if key in result else entry
    return Entry(result, layer.place)


def _continues(base: Entry, layer: Entry, key: str) -> bool:
    """Whether the layer's `key`, one of several that exclude each other, is a map that changes the base's: `model.config` of the
    same architecture. Another architecture's configuration shares no key with it."""
    if key not in base.value or not isinstance(getattr(layer.value.get(key), "value", None), dict):
        return False
    architectures = [entry.value["architecture"].value for entry in (base, layer) if "architecture" in entry.value]
    return len(set(architectures)) < 2


def _merge_stages(base: Entry, layer: Entry) -> Entry:
    result = list(base.value)
    names = {stage_name(entry): index for index, entry in enumerate(result)}
    for name, change in layer.value.items():
        if name in names:
            result[names[name]] = merge(result[names[name]], change, ("stages", names[name]))
        elif isinstance(change.value, dict) and set(NEW_STAGE_KEYS) <= set(change.value):
            result.append(Entry({"name": Entry(name, change.place), **change.value}, change.place))
        else:  # without the keys that every stage needs it is a change under a mistaken name
            known = ", ".join(str(known) for known in names)
            message = f"the extended recipe has no stage `{name}`; it has: {known} (a new stage needs {', '.join(NEW_STAGE_KEYS)})"
            raise RecipeError([Problem(("stages", name), message, change.place)])
    return Entry(result, base.place)


def stage_name(entry: Entry) -> Any:
    name = entry.value.get("name") if isinstance(entry.value, dict) else None
    return name.value if name else None


def expand_shorthands(root: Entry) -> Entry:
    """Writes `mixture: {a: 1}` and `tokenizer: dir` in full, so that layers in either form merge."""
    if not isinstance(root.value, dict):
        return root
    tokenizer = root.value.get("tokenizer")
    if tokenizer is not None and isinstance(tokenizer.value, str):
        root.value["tokenizer"] = Entry({"path": tokenizer}, tokenizer.place)
    stages = root.value.get("stages")
    if stages is not None and isinstance(stages.value, (list, dict)):
        for stage in stages.value if isinstance(stages.value, list) else stages.value.values():
            mixture = stage.value.get("mixture") if isinstance(stage.value, dict) else None
            if mixture is not None and is_plain_mixture(mixture.plain()):
                stage.value["mixture"] = Entry({"weights": mixture}, mixture.place)
    return root
