"""Everything a run needs of its data, made once: shards, tokenizer, indexes. Calling again is instant.

`<run dir>/data/prepared.json` pins what was prepared: while it fits the recipe's data and tokenizer sections, nothing is listed or
read again, and a run that resumes next month sees the same samples even if somebody has added files to a source. The shards and
indexes themselves lie in `data.cache_dir` (shared between runs) or beside that file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from terrace.data.family import family_of
from terrace.data.index.build import build_index
from terrace.data.index.content import leaking_rows, repeated_rows
from terrace.data.index.source_index import LeftOut, SourceIndex, load_index
from terrace.data.parallel import Progress
from terrace.data.sources.conventions import Rules
from terrace.data.sources.ingest import IngestReport, ingest_source
from terrace.data.sources.refusals import Refusal
from terrace.data.sources.shard_walk import scan_shard
from terrace.data.sources.shards import sample_of_members
from terrace.data.template import written_texts
from terrace.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.families.interface import Family
from terrace.families.registry import family_values, stored_family
from terrace.recipe.changes import stage_recipe
from terrace.recipe.schema import Recipe, Storage
from terrace.recipe.schema_inputs import REMEDIES
from terrace.storage.files import absolute, is_remote, join, list_files, read_file, write_file

TOKENIZER_TEXT_CHARACTERS = 4_000_000  # per source, from its first shards: enough for the small vocabularies trained here
PREPARED_VERSION = 5


@dataclass
class PreparedData:
    """The data of a run, ready to plan and stream: as the recipe's model reads it, and as models of another family do that stages bring."""

    indexes: dict[str, SourceIndex]
    tokenizer_dir: Path
    root: Path
    family: Family
    others: dict[str, PreparedData] = dataclasses.field(default_factory=dict)  # by the family's name

    def tokenizer(self) -> TextTokenizer:
        return load_tokenizer(self.tokenizer_dir)

    @property
    def sources(self) -> dict[str, SourceIndex]:
        """Every source, as the first family that reads it does."""
        found: dict[str, SourceIndex] = {}
        for one in (self, *self.others.values()):
            found = one.indexes | found
        return found

    def read_by(self, family: str) -> PreparedData:
        """The data as a family of this name reads it; as the recipe's own does where no stage has such a model."""
        return self.others.get(family, self)

    def seen_by(self, family: Family) -> PreparedData:
        """The same samples as another family (of the same tokens and conversation) measures them."""
        indexes = {name: dataclasses.replace(index, family=family, _lengths={}) for name, index in self.indexes.items()}
        return dataclasses.replace(self, indexes=indexes, family=family)


def stage_data(recipe: Recipe, stage_index: int, prepared: PreparedData) -> tuple[Recipe, PreparedData]:
    """Recipe and data as a stage sees them, with the changes of the model on the way to it."""
    seen = stage_recipe(recipe, stage_index)
    if seen is recipe:
        return seen, prepared
    family = prepared.tokenizer().fit(family_of(seen.model))
    return seen, prepared.read_by(family.name).seen_by(family)


def prepare_data(
    recipe: Recipe, run_dir: str | Path | None = None, progress: Progress | None = None, use_ray: bool | None = None
) -> PreparedData:
    """Ingest and index every source that a stage uses, train or load the tokenizer. Restartable at any point, instant when done.

    `run_dir`: the run's folder; without one the data goes below the user's cache folder, under the recipe's name, and sources that
    have changed since are read again.
    """
    root = Path(absolute(str(run_dir))) / "data" if run_dir is not None else _made(default_root(recipe))
    pinned = _load_manifest(root)
    mark = data_mark(recipe)
    if run_dir is not None and pinned is not None and pinned.get("mark") == mark:  # a run keeps what it began with
        try:
            return load_prepared(root)
        except (InputError, FileNotFoundError):
            pass  # its shards or indexes were deleted: made again below
    out_dir = absolute(recipe.data.cache_dir) if recipe.data.cache_dir else str(root)
    names = used_sources(recipe)
    reports = {name: ingest_source(name, recipe.data.sources[name], recipe.data, out_dir, progress, use_ray) for name in names}
    tokenizer = prepare_tokenizer(recipe, reports, out_dir, progress)

    def view(family: Family, read: list[str]) -> dict[str, Any]:
        entries = {}
        for name in read:
            source = recipe.data.sources[name]
            storage, most = recipe.data.storage, recipe.data.max_image_pixels
            folder = build_index(name, source, reports[name], tokenizer, family, most, storage, progress, use_ray)
            entries[name] = {
                "folder": _relative(folder, str(root)), "holdout_samples": source.holdout_samples, "holdout_share": source.holdout_share,
                "max_samples": source.max_samples,
            }  # fmt: skip
        return {"sources": entries, "family": family_values(family)}

    first, *others = [view(tokenizer.fit(family), read) for family, read in readers(recipe)]
    manifest = {
        "version": PREPARED_VERSION, "mark": mark, "seed": recipe.data.seed, **first, **({"others": others} if others else {}),
        "tokenizer_dir": _relative(str(tokenizer.directory), str(root)), "storage": recipe.data.storage.model_dump(),
        "deduplicate": recipe.data.deduplicate,
    }  # fmt: skip
    write_file(str(root / "prepared.json"), json.dumps(manifest, indent=1).encode())
    return load_prepared(root)


def load_prepared(root: str | Path) -> PreparedData:
    """The data that `prepare_data` left in `root`, for example in a worker. Raises InputError where there is none."""
    root = Path(absolute(str(root)))
    manifest = _load_manifest(root)
    if manifest is None:
        raise InputError(f"there is no prepared data in {root}; the run prepares it before its first stage")
    try:
        storage = Storage(**manifest["storage"])
        views = [manifest, *manifest.get("others", [])]
        families = [stored_family(one["family"]) for one in views]
        drop = manifest["deduplicate"] == "drop"
        tokenizer_dir = Path(_resolved(manifest["tokenizer_dir"], root))
        places = [
            {
                name: (
                    _resolved(entry["folder"], root),
                    {"seed": manifest["seed"], **{key: entry[key] for key in ("holdout_samples", "holdout_share", "max_samples")}},
                )
                for name, entry in one["sources"].items()
            }
            for one in views
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be understood ({error})"
        raise _broken(root, what) from error
    loaded = [
        {name: load_index(place, family, storage, **choice) for name, (place, choice) in read.items()}
        for family, read in zip(families, places)
    ]
    leave_out_repeats(loaded, drop)
    others = {family.name: PreparedData(indexes, tokenizer_dir, root, family) for family, indexes in zip(families[1:], loaded[1:])}
    return PreparedData(loaded[0], tokenizer_dir, root, families[0], others)


def leave_out_repeats(views: Sequence[Mapping[str, SourceIndex]], drop: bool) -> None:
    """Nothing that any source holds out, of whatever model, is trained through another row; with `drop`, no model sees a row twice.

    Which rows that are is found when somebody asks, from the indexes as they are now; whoever keeps the answer knows it by its mark.
    """
    every = {f"{number}/{name}": index for number, indexes in enumerate(views) for name, index in indexes.items()}
    marks = [[key, index.identity, index.wanted.mark] for key, index in every.items()]
    mark = hashlib.sha256(json.dumps([marks, drop]).encode()).hexdigest()

    @cache
    def found() -> dict[str, dict[str, np.ndarray]]:
        rows = {key: {"held_out_elsewhere": leaking} for key, leaking in leaking_rows(every).items()}
        for number, indexes in enumerate(views if drop else ()):
            for name, repeats in repeated_rows(indexes).items():
                rows[f"{number}/{name}"]["duplicate"] = repeats
        return rows

    for number, indexes in enumerate(views):
        leaving = LeftOut(f"{mark}-{number}", partial(_of_view, found, number, list(indexes)))
        for index in indexes.values():
            index.leaving = leaving


def _of_view(
    found: Callable[[], dict[str, dict[str, np.ndarray]]], number: int, names: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    return {name: found()[f"{number}/{name}"] for name in names}


def readers(recipe: Recipe) -> list[tuple[Family, list[str]]]:
    """Every family that some stage's model is of, the recipe's own first, and the sources that its stages use, in the recipe's order."""
    families = {(own := family_of(recipe.model.written)).name: own}
    used: dict[str, set[str]] = {own.name: set()}
    for index, stage in enumerate(recipe.stages):
        family = family_of(stage_recipe(recipe, index).model)
        families.setdefault(family.name, family)
        used.setdefault(family.name, set()).update(stage.mixture.weights)
    return [(family, [source for source in recipe.data.sources if source in used[name]]) for name, family in families.items()]


def used_sources(recipe: Recipe) -> list[str]:
    """Names of the sources that some stage's mixture names, in the recipe's order."""
    used = {name for stage in recipe.stages for name in stage.mixture.weights}
    return [name for name in recipe.data.sources if name in used]


def default_root(recipe: Recipe) -> Path:
    """Where a recipe's data goes when no run names a folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "terrace" / f"{recipe.name}-{data_mark(recipe)[:12]}"


def _made(root: Path) -> Path:
    """The folder, once it is there. Raises InputError where the user's cache folder cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{root}: the folder for prepared data cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return root


def data_mark(recipe: Recipe) -> str:
    """sha256 of what the prepared data depends on."""
    sources = {name: recipe.data.sources[name].model_dump(exclude=REMEDIES) for name in used_sources(recipe)}
    data = recipe.data.model_dump(exclude={"sources"}) | {"sources": sources}
    value = {
        "version": PREPARED_VERSION, "data": data, "tokenizer": recipe.tokenizer.model_dump(),
        "family": family_values(family_of(recipe.model)),
    }  # fmt: skip
    (_, read), *others = readers(recipe)
    if others:
        value["readers"] = [read, *([family_values(family), names] for family, names in others)]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- tokenizer


def prepare_tokenizer(recipe: Recipe, reports: dict[str, IngestReport], out_dir: str, progress: Progress | None = None) -> TextTokenizer:
    """The recipe's tokenizer: a local folder as it is, one on S3 copied here, or one trained on the sources' texts."""
    families = [family for family, _ in readers(recipe)]
    if recipe.tokenizer.path is not None:
        if is_remote(recipe.tokenizer.path):
            found = _made_once(_tokenizer_folder(out_dir, recipe.tokenizer.path), lambda folder: _download(recipe, folder))
        else:
            found = load_tokenizer(absolute(recipe.tokenizer.path))
        for family in families:
            found.marks(family)  # refused before anything is indexed with it
        return found
    if recipe.tokenizer.train_vocabulary_size is None:
        raise InputError("tokenizer: give `path`, or `train_vocabulary_size` to train one on the recipe's own text")
    size = recipe.tokenizer.train_vocabulary_size
    names = "+".join(family.name for family in families)
    mark = json.dumps([size, names, [[name, report.fingerprint] for name, report in sorted(reports.items())]])
    texts = _texts(recipe, reports, progress)
    return _made_once(_tokenizer_folder(out_dir, mark), lambda folder: train_tokenizer(texts, size, folder, *families))


def _tokenizer_folder(out_dir: str, mark: str) -> Path:
    if is_remote(out_dir):
        out_dir = str(Path(tempfile.gettempdir()) / "terrace-tokenizers")
    return Path(out_dir) / f"tokenizer-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"


def _made_once(folder: Path, make: Callable[[Path], Any]) -> TextTokenizer:
    """The tokenizer in `folder`, made beside it and renamed if it is not there. Whoever comes first wins."""
    if not (folder / "tokenizer.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tokenizer-", dir=folder.parent))
        try:
            make(temporary)
            temporary.chmod(0o755)
            if not (folder / "tokenizer.json").is_file():
                os.replace(temporary, folder)
        except OSError:
            if not (folder / "tokenizer.json").is_file():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return load_tokenizer(folder)


def _download(recipe: Recipe, folder: Path) -> None:
    assert recipe.tokenizer.path is not None
    storage = recipe.data.storage
    small = (".json", ".txt", ".jinja", ".model")  # a checkpoint's weights may lie beside its tokenizer
    for file in list_files(recipe.tokenizer.path, storage):
        if not file.uri.endswith(small):
            continue
        (folder / file.uri.rsplit("/", 1)[-1]).write_bytes(read_file(file.uri, storage))


def _texts(recipe: Recipe, reports: dict[str, IngestReport], progress: Progress | None) -> Iterator[str]:
    """Texts of every source, in order, up to TOKENIZER_TEXT_CHARACTERS each."""
    for number, (name, report) in enumerate(reports.items()):
        if progress is not None:
            progress("train tokenizer", number, len(reports))
        left = TOKENIZER_TEXT_CHARACTERS
        for text in _source_texts(recipe, name, report):
            yield text
            left -= len(text)
            if left <= 0:
                break
    if progress is not None:
        progress("train tokenizer", len(reports), len(reports))


def _source_texts(recipe: Recipe, name: str, report: IngestReport) -> Iterator[str]:
    source, family = recipe.data.sources[name], family_of(recipe.model)
    rules = Rules.of(source)
    for shard in report.shards:
        try:
            for group in scan_shard(shard.uri, recipe.data.storage):
                if group.refusal is not None:
                    continue  # listed by the index
                try:
                    sample, _ = sample_of_members(group.key, group.data, group.key, source.kind, rules)
                except Refusal:
                    continue  # listed by the index
                yield from _sample_texts(sample, family)
        except Refusal:
            continue  # the rest of a damaged shard; listed by the index


def _sample_texts(sample: Sample, family: Family) -> Iterator[str]:
    try:
        yield from list(written_texts(sample, family))
    except InputError:
        return  # the index lists it: the family cannot write it


# ---------------------------------------------------------------- manifest


def _load_manifest(root: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads(read_file(str(root / "prepared.json")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _broken(root, f"is no JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise _broken(root, "is no JSON object")
    return manifest if manifest.get("version") == PREPARED_VERSION else None


def _broken(root: Path, what: str) -> InputError:
    """It is never replaced silently: the run would go on with other samples than it began with."""
    return InputError(f"{root / 'prepared.json'} {what}; restore the file, or delete it to prepare the data again")


def _relative(uri: str, root: str) -> str:
    """Relative to `root` where it lies below, so that a run's folder may be moved."""
    return uri[len(root) + 1 :] if uri.startswith(root + "/") else uri


def _resolved(uri: str, root: Path) -> str:
    return uri if is_remote(uri) or uri.startswith("/") else join(str(root), uri)
