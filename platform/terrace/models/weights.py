"""Where initial weights come from: random numbers seeded by name, Hugging Face directories, or one source per part.

A source is asked by name, for one tensor at a time or, where weights are stored as the model has them, for parts of tensors: a
strategy that shards reads what it keeps. The random weights of a tensor depend on the seed and its name only, never on ranks or the order
of calls. Every tensor that is missing, unexpected or of another shape is named; nothing is silently left random.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from terrace.errors import InputError
from terrace.families.configurations import language_config
from terrace.models.families.interface import FamilyModel
from terrace.models.families.registry import family_of_model
from terrace.models.part_sources import differences, part_directory
from terrace.models.surgery import Surgery
from terrace.models.tensor_files import Directory, Stretch
from terrace.recipe.schema import PARTS, Model, PartName
from terrace.recipe.schema_changes import ModelChanges

log = logging.getLogger(__name__)

TensorSource = Callable[[str], torch.Tensor]  # parameter name -> full tensor on the CPU


@runtime_checkable
class PartSource(Protocol):
    """A source that also reads parts of tensors, so that no more is read than is held."""

    def __call__(self, name: str) -> torch.Tensor: ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor whose parts can be read; None: it comes only whole."""

    def stretches(self, wanted: Sequence[Stretch]) -> Iterator[torch.Tensor]:
        """Parts of tensors, flat, in the order asked."""


def stretches_of(source: TensorSource, wanted: Sequence[Stretch]) -> Iterator[torch.Tensor]:
    """Parts of tensors, flat, in the order asked, from any source."""
    if isinstance(source, PartSource):
        yield from source.stretches(wanted)
        return
    for stretch in wanted:
        yield source(stretch.name).reshape(-1)[stretch.start : stretch.end]


def part_shape(source: TensorSource, name: str) -> tuple[int, ...] | None:
    """The shape of a tensor whose parts the source can read; None: it gives it only whole."""
    return source.shape(name) if isinstance(source, PartSource) else None


class SourceWithOwn:
    """A source beside which some tensors come from elsewhere, as those of adapters and of heads do."""

    def __init__(
        self, source: TensorSource, is_own: Callable[[str], bool], own: TensorSource, name_there: Callable[[str], str] = lambda name: name
    ) -> None:
        self._source, self._is_own, self._own, self._name_there = source, is_own, own, name_there

    def __call__(self, name: str) -> torch.Tensor:
        return self._own(name) if self._is_own(name) else self._source(self._name_there(name))

    def shape(self, name: str) -> tuple[int, ...] | None:
        return None if self._is_own(name) else part_shape(self._source, self._name_there(name))

    def stretches(self, wanted: Sequence[Stretch]) -> Iterator[torch.Tensor]:
        for own, run in itertools.groupby(wanted, lambda stretch: self._is_own(stretch.name)):
            if own:
                yield from stretches_of(self._own, list(run))
            else:
                there = [Stretch(self._name_there(stretch.name), stretch.start, stretch.end) for stretch in run]
                yield from stretches_of(self._source, there)


@dataclass
class LoadReport:
    """What happened to tensors that were not simply copied. Each entry is one line for a person."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def random_source(skeleton: Any, seed: int) -> TensorSource:
    """transformers' own initialisation of the model's classes, drawn per module from (seed, module name), in float32."""
    family = family_of_model(skeleton)
    skeleton = copy.deepcopy(skeleton)  # a strategy may shard or fill the original before the last call
    owners: dict[str, Any] = {}
    for name, module in skeleton.named_modules():
        parent = name.rpartition(".")[0]
        owners[name] = module if isinstance(module, PreTrainedModel) else owners.get(parent, skeleton)

    def read(name: str) -> torch.Tensor:
        module_name, _, leaf = name.rpartition(".")
        start = family.initial(name, skeleton.config, skeleton.get_parameter(name).shape)
        if start is not None:
            return start
        path = module_name.split(".") if module_name else []
        levels = range(len(path), max(0, len(path) - family.starts_around) - 1, -1)  # from the module itself outwards
        outer = ".".join(path[: levels[-1]])
        around = copy.deepcopy(skeleton.get_submodule(outer)).to_empty(device="cpu").float()
        digest = hashlib.sha256(f"{seed}:{module_name}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            for level in levels:
                owners[".".join(path[:level])]._init_weights(around.get_submodule(".".join(path[levels[-1] : level])))
            module = around.get_submodule(".".join(path[levels[-1] :]))
            if (own := getattr(module, "reset_own_parameters", None)) is not None:  # a module of ours inside a class of transformers
                own()
        return getattr(module, leaf).detach()

    return read


def initial_weights(
    model: Model, skeleton: Any, start: Path | None = None, changes: ModelChanges | None = None
) -> tuple[TensorSource, LoadReport]:
    """`compared_weights`, and what is worth saying about them said in the log."""
    source, report = compared_weights(model, skeleton, start, changes)
    for line in report.unexpected + report.notes:
        log.warning("initial weights: %s", line)
    return source, report


def compared_weights(
    model: Model, skeleton: Any, start: Path | None = None, changes: ModelChanges | None = None,
    opened: Callable[[str, FamilyModel], Directory] = Directory,
) -> tuple[TensorSource, LoadReport]:
    """The source of every parameter of `skeleton`, and what is worth saying about it.

    `start` is the directory of an earlier stage's final weights and wins over the recipe's own. Raises InputError
    that names every missing and reshaped tensor of a directory. Growing vocabularies (more rows in embeddings and
    output) are allowed: the rows that the directory lacks are random. Another RoPE base is allowed and said. `changes` are those
    that the stage makes to what it starts from (models.surgery); `opened` opens a place of `model.init`. s3:// is reached as the
    environment says (AWS_ENDPOINT_URL, AWS_REGION).
    """
    random, family = random_source(skeleton, model.seed), family_of_model(skeleton)
    report = LoadReport()
    by_part: dict[PartName, Directory | None] = dict.fromkeys(PARTS)
    if start is not None or model.pretrained is not None:
        directory = Directory(start if start is not None else str(model.pretrained), family)
        by_part = dict.fromkeys(PARTS, directory)
    elif model.init is not None:
        for part in PARTS:
            place = getattr(model.init, part)
            by_part[part] = None if place == "random" else part_directory(opened(place, family), family, skeleton)
            report.reshaped += differences(skeleton.config, by_part[part], part)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    surgery = Surgery(changes, skeleton, family)
    grown = _compare(shapes, by_part, report, family, surgery)
    _compare_positions(skeleton.config, by_part["language"], report)
    if report.missing or report.reshaped:
        raise InputError("initial weights do not fit the model: " + "; ".join(report.missing + report.reshaped))
    return InitialWeights(by_part, random, family, surgery, grown, shapes), report


class InitialWeights:
    """The source that `initial_weights` gives."""

    def __init__(
        self, by_part: Mapping[PartName, Directory | None], random: TensorSource, family: FamilyModel, surgery: Surgery, grown: set[str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._by_part, self._random, self._family, self._surgery = by_part, random, family, surgery
        self._grown, self._shapes = grown, shapes

    def __call__(self, name: str) -> torch.Tensor:
        directory = self._by_part[self._family.part_of(name)]
        lacks = directory is None or name not in directory.names
        if lacks and (other := self._family.copied_from(name)) is not None:
            return self(other)
        if directory is None or (name not in directory.names and not self._surgery.makes(name)):
            return self._random(name)
        tensor = self._surgery.read(directory, name)
        if name in self._grown:
            whole = self._random(name).to(tensor.dtype)
            whole[: tensor.shape[0]] = tensor
            return whole
        return tensor

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes[name] if self._as_stored(name) is not None else None

    def stretches(self, wanted: Sequence[Stretch]) -> Iterator[torch.Tensor]:
        for directory, run in itertools.groupby(wanted, lambda stretch: self._as_stored(stretch.name)):
            if directory is not None:
                yield from directory.stretches(list(run))
            else:
                yield from (self(stretch.name).reshape(-1)[stretch.start : stretch.end] for stretch in run)

    def _as_stored(self, name: str) -> Directory | None:
        """The directory that holds a tensor as the model has it."""
        directory = self._by_part[self._family.part_of(name)]
        if directory is None or name not in directory.names or not directory.reads_parts(name):
            return None
        return directory if directory.shape(name) == self._shapes[name] else None  # neither grown nor stretched


def _compare(
    shapes: dict[str, tuple[int, ...]], by_part: dict[PartName, Directory | None], report: LoadReport, family: FamilyModel,
    surgery: Surgery,
) -> set[str]:
    """Fill the report; returns the names of vocabulary tensors that grow."""
    grown = set()
    for name, shape in shapes.items():
        directory = by_part[family.part_of(name)]
        if directory is None:
            continue
        if (note := surgery.note(directory, name, shape)) is not None:
            report.notes.append(note)
            continue
        if name not in directory.names and (family.may_be_new(name) or directory.begins_new(name)):
            begins = "random" if (other := family.copied_from(name)) is None else f"as a copy of {other}"
            report.notes.append(f"{name} is not in {directory.path} and starts {begins}")
            continue
        if name not in directory.names:
            report.missing.append(f"{name} is missing in {directory.path}")
            continue
        found = directory.shape(name)
        if found == shape:
            continue
        vocabulary = name in (family.head, family.embedding)
        if vocabulary and found[1:] == shape[1:] and found[0] < shape[0]:
            grown.add(name)
            report.notes.append(f"{name} grows from {found[0]} to {shape[0]} rows; the new rows are random")
        else:
            report.reshaped.append(f"{name} has shape {list(found)} in {directory.path}, the model has {list(shape)}")
    for part, directory in by_part.items():
        if directory is not None:
            report.unexpected.extend(_unexpected(directory, part, {*shapes, *surgery.used_up}, family))
            report.notes.extend(directory.notes())
    return grown


def _compare_positions(config: Any, directory: Directory | None, report: LoadReport) -> None:
    """Say so where the language model's weights were trained with another RoPE base: a choice for long context, or a mistake."""
    if directory is None:
        return
    text = directory.config.get("text_config") or directory.config
    trained = (text.get("rope_parameters") or {}).get("rope_theta", text.get("rope_theta"))
    wanted = (getattr(language_config(config), "rope_parameters", None) or {}).get("rope_theta")
    if trained is not None and wanted is not None and float(trained) != float(wanted):
        report.notes.append(f"the language weights of {directory.path} have RoPE base {trained:g}, the model has {wanted:g}")


def _unexpected(directory: Directory, part: PartName, known: Iterable[str], family: FamilyModel) -> list[str]:
    names = set(known)
    lines = []
    for name in sorted(directory.names - names):
        try:
            belongs = family.part_of(name) == part
        except InputError:
            belongs = part == "language"  # tensors of no part are named once
        tied = name == family.head
        if belongs and not tied:
            lines.append(f"{name} in {directory.path} is not part of the model and is left out")
    return lines
