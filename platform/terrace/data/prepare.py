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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.data.family import family_of
from terrace.data.index.build import build_index
from terrace.data.index.content import leaking_rows, repeated_rows
from terrace.data.index.source_index import SourceIndex, load_index
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
PREPARED_VERSION = 4


@dataclass
class PreparedData:
    """The data of a run, ready to plan and stream."""

    indexes: dict[str, SourceIndex]
    tokenizer_dir: Path
    root: Path
    family: Family

    def tokenizer(self) -> TextTokenizer:
        return load_tokenizer(self.tokenizer_dir)

    def seen_by(self, family: Family) -> PreparedData:
        """The same samples as another family (of the same tokens and conversation) measures them."""
        indexes = {name: dataclasses.replace(index, family=family, _lengths={}) for name, index in self.indexes.items()}
        return dataclasses.replace(self, indexes=indexes, family=family)


def stage_data(recipe: Recipe, stage_index: int, prepared: PreparedData) -> tuple[Recipe, PreparedData]:
    """Recipe and data as a stage sees them, with the changes of the model on the way to it."""
    seen = stage_recipe(recipe, stage_index)
    return seen, prepared if seen is recipe else prepared.seen_by(prepared.tokenizer().fit(family_of(seen.model)))


def prepare_data(
    recipe: Recipe, run_dir: str | Path | None = None, progress: Progress | None = None, use_ray: bool | None = None
) -> PreparedData:
    """Ingest and index every source that a stage uses, train or load the tokenizer. Restartable at any point, instant when done.

    `run_dir`: the run's folder; without one the data goes below the user's cache folder, under the recipe's name.
    """
    root = Path(absolute(str(run_dir))) / "data" if run_dir is not None else default_root(recipe)
    pinned = _load_manifest(root)
    mark = data_mark(recipe)
    if pinned is not None and pinned.get("mark") == mark:
        try:
            return load_prepared(root)
        except (InputError, FileNotFoundError):
            pass  # its shards or indexes were deleted: made again below
    out_dir = absolute(recipe.data.cache_dir) if recipe.data.cache_dir else str(root)
    names, family = used_sources(recipe), family_of(recipe.model)
    reports = {name: ingest_source(name, recipe.data.sources[name], recipe.data, out_dir, progress, use_ray) for name in names}
    tokenizer = prepare_tokenizer(recipe, reports, out_dir, progress)
    family = tokenizer.fit(family)
    entries = {}
    for name in names:
        source = recipe.data.sources[name]
        storage, most = recipe.data.storage, recipe.data.max_image_pixels
        folder = build_index(name, source, reports[name], tokenizer, family, most, storage, progress, use_ray)
        entries[name] = {
            "folder": _relative(folder, str(root)), "holdout_samples": source.holdout_samples, "holdout_share": source.holdout_share,
            "max_samples": source.max_samples,
        }  # fmt: skip
    manifest = {
        "version": PREPARED_VERSION, "mark": mark, "seed": recipe.data.seed, "sources": entries,
        "tokenizer_dir": _relative(str(tokenizer.directory), str(root)), "storage": recipe.data.storage.model_dump(),
        "family": family_values(family), "deduplicate": recipe.data.deduplicate,
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
        family = stored_family(manifest["family"])
        drop = manifest["deduplicate"] == "drop"
        tokenizer_dir = Path(_resolved(manifest["tokenizer_dir"], root))
        places = {
            name: (
                _resolved(entry["folder"], root),
                {"seed": manifest["seed"], **{key: entry[key] for key in ("holdout_samples", "holdout_share", "max_samples")}},
            )
            for name, entry in manifest["sources"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be understood ({error})"
        raise _broken(root, what) from error
    indexes = {name: load_index(place, family, storage, **choice) for name, (place, choice) in places.items()}
    leave_out_repeats(indexes, drop)
    return PreparedData(indexes, tokenizer_dir, root, family)


def leave_out_repeats(indexes: Mapping[str, SourceIndex], drop: bool) -> None:
    """Nothing that any source holds out is trained through another row; with `drop`, nothing is trained through two."""
    for name, rows in leaking_rows(indexes).items():
        indexes[name].leave_out("held_out_elsewhere", rows)
    if drop:
        for name, rows in repeated_rows(indexes).items():
            indexes[name].leave_out("duplicate", rows)


def used_sources(recipe: Recipe) -> list[str]:
    """Names of the sources that some stage's mixture names, in the recipe's order."""
    used = {name for stage in recipe.stages for name in stage.mixture.weights}
    return [name for name in recipe.data.sources if name in used]


def default_root(recipe: Recipe) -> Path:
    """Where a recipe's data goes when no run names a folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "terrace" / f"{recipe.name}-{data_mark(recipe)[:12]}"


def data_mark(recipe: Recipe) -> str:
    """sha256 of what the prepared data depends on."""
    sources = {name: recipe.data.sources[name].model_dump(exclude=REMEDIES) for name in used_sources(recipe)}
    data = recipe.data.model_dump(exclude={"sources"}) | {"sources": sources}
    value = {
        "version": PREPARED_VERSION, "data": data, "tokenizer": recipe.tokenizer.model_dump(),
        "family": family_values(family_of(recipe.model)),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- tokenizer


def prepare_tokenizer(recipe: Recipe, reports: dict[str, IngestReport], out_dir: str, progress: Progress | None = None) -> TextTokenizer:
    """The recipe's tokenizer: a local folder as it is, one on S3 copied here, or one trained on the sources' texts."""
    family = family_of(recipe.model)
    if recipe.tokenizer.path is not None:
        if is_remote(recipe.tokenizer.path):
            found = _made_once(_tokenizer_folder(out_dir, recipe.tokenizer.path), lambda folder: _download(recipe, folder))
        else:
            found = load_tokenizer(absolute(recipe.tokenizer.path))
        found.marks(family)  # refused before anything is indexed with it
        return found
    if recipe.tokenizer.train_vocabulary_size is None:
        raise InputError("tokenizer: give `path`, or `train_vocabulary_size` to train one on the recipe's own text")
    size = recipe.tokenizer.train_vocabulary_size
    mark = json.dumps([size, family.name, [[name, report.fingerprint] for name, report in sorted(reports.items())]])
    texts = _texts(recipe, reports, progress)
    return _made_once(_tokenizer_folder(out_dir, mark), lambda folder: train_tokenizer(texts, size, folder, family))


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
