"""What lies at a source's URI: which files hold samples, in which format, and which files do not.

All files that hold samples are read, of whatever formats. Where there are files of rows (tar, Parquet, JSON, JSON Lines, CSV), images are
what rows name and text files are something else; where there are none, images are samples with their captions beside them, and text files
are documents. `metadata.*` and a picture's own `.json` belong to the images. What is left, a video or an archive, is told.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

from terrace.data.images import IMAGE_EXTENSIONS
from terrace.errors import InputError
from terrace.recipe.schema import Source, Storage
from terrace.storage.files import StoredFile, list_files, read_file

TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDE_SUFFIXES = ("txt", "caption", "json")
LLAMA_FACTORY_INDEX = "dataset_info.json"
ROW_FORMATS = ("webdataset", "parquet", "jsonl", "json", "csv")
PACKED = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstd"}
_FORMAT_OF_EXTENSION = {
    "tar": "webdataset", "parquet": "parquet", "jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "csv": "csv", "tsv": "csv",
}  # fmt: skip
_PACKED_TARS = ("tar.gz", "tgz", "tar.zst", "tar.bz2", "tar.xz")
_HOLDS_DATA = frozenset(  # endings of files that hold data which nobody here reads: told, not passed over
    "zip 7z rar arrow feather mp4 avi mov mkv webm wav mp3 flac ogg xls xlsx pkl npz npy h5 hdf5 tfrecord mds heic heif raw svg pdf".split()  # noqa: SIM905
)
_DESCRIBES_DATA = ("dataset_infos.json", "state.json", "dataset_dict.json", LLAMA_FACTORY_INDEX)
_NO_DOCUMENTS = ("readme", "license", "licence", "copying", "notice", "changelog", "citation")


@dataclass(frozen=True)
class Listing:
    """The files of a source that hold samples, by format, and lines about those that nobody reads."""

    name: str  # the formats, joined by `+`
    files: dict[str, list[StoredFile]]  # format -> files; image_folder has its captions too
    told: tuple[tuple[str, str, str], ...] = field(default=())  # (file, reason, sentence)

    @property
    def all_files(self) -> list[StoredFile]:
        return [file for files in self.files.values() for file in files]


def list_source(name: str, source: Source, storage: Storage) -> Listing:
    """The files of a source. Raises InputError when there is nothing, or nothing known, at its URI."""
    listed = list_files(source.uri, storage)
    if not listed:
        raise InputError(f"source {name}: there is no file at {source.uri}; check data.sources.{name}.uri")
    index = next((file for file in listed if base_name(file) == LLAMA_FACTORY_INDEX and is_llama_factory(file, storage)), None)
    if index is not None and (len(listed) == 1 or source.format == "auto"):
        return Listing("llama_factory", {"llama_factory": [index]})
    formats: dict[str, list[StoredFile]] = {}
    for file in listed:
        formats.setdefault(format_of(file.uri), []).append(file)
    if source.format != "auto":
        return _of_format(name, source, formats, listed)
    if "image_folder" in formats:
        formats = _without_captions(formats)
    rows = {known: formats[known] for known in ROW_FORMATS if formats.get(known)}
    rows, told = _without_descriptions(rows)
    if rows:
        return Listing("+".join(rows), rows, (*told, *_unread(formats)))
    if "image_folder" in formats:
        return Listing("image_folder", {"image_folder": listed}, _unread(formats))
    if "text" in formats:
        documents = [file for file in formats["text"] if base_name(file).partition(".")[0].lower() not in _NO_DOCUMENTS]
        described = tuple(
            (base_name(file), "not_a_sample", "the file describes the data") for file in formats["text"] if file not in documents
        )
        if documents:
            return Listing("text", {"text": documents}, (*described, *_unread(formats)))
    raise InputError(
        f"source {name}: nothing at {source.uri} has a known format (found {counts(formats)}); known are tar, parquet, jsonl,"
        " json, csv, txt and images"
    )


def format_of(uri: str) -> str:
    base = uri.rsplit("/", 1)[-1].lower()
    if base.endswith(_PACKED_TARS):
        return "webdataset"  # ingest rewrites it
    stem, _, extension = base.rpartition(".")
    if extension in PACKED:
        extension = stem.rpartition(".")[2]
        return _FORMAT_OF_EXTENSION[extension] if extension in ("jsonl", "ndjson", "json", "csv", "tsv") else f".{base.rpartition('.')[2]}"
    if extension in IMAGE_EXTENSIONS:
        return "image_folder"
    if extension in ("txt", "md"):
        return "text"
    return _FORMAT_OF_EXTENSION.get(extension, f".{extension}")


def base_name(file: StoredFile) -> str:
    return file.uri.rsplit("/", 1)[-1]


def is_llama_factory(file: StoredFile, storage: Storage) -> bool:
    """Whether a dataset_info.json is LLaMA-Factory's, and not the one of a Hugging Face data set."""
    try:
        value = json.loads(read_file(file.uri, storage))
    except (ValueError, OSError, RecursionError):
        return False
    places = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
    return isinstance(value, dict) and any(isinstance(entry, dict) and any(place in entry for place in places) for entry in value.values())


def counts(formats: dict[str, list[StoredFile]]) -> str:
    return ", ".join(f"{len(files)} {kind}" for kind, files in sorted(formats.items())) or "nothing"


def _of_format(name: str, source: Source, formats: dict[str, list[StoredFile]], listed: list[StoredFile]) -> Listing:
    """The files of the one format that the recipe names."""
    wanted = formats.get(source.format, [])
    if source.format == "jsonl" and not wanted:
        wanted = formats.get("json", []) or ([listed[0]] if len(listed) == 1 else [])
    if source.format == "image_folder":
        wanted = listed
    if not wanted:
        raise InputError(f"source {name}: format is {source.format}, but {source.uri} holds {counts(formats)}")
    return Listing(source.format, {source.format: wanted})


def _without_captions(formats: dict[str, list[StoredFile]]) -> dict[str, list[StoredFile]]:
    """Without files that belong to images: metadata tables and a picture's own json, unless rows lie beside them."""
    stems = {file.uri.rpartition(".")[0] for file in formats["image_folder"]}

    def belongs(file: StoredFile) -> bool:
        return base_name(file) in TABLE_NAMES or (file.uri.endswith(".json") and file.uri.rpartition(".")[0] in stems)

    rows = {known: [file for file in files if known not in ROW_FORMATS or not belongs(file)] for known, files in formats.items()}
    rows, _ = _without_descriptions(rows)
    if not any(rows.get(known) for known in ROW_FORMATS):
        return rows
    sided = [file for file in formats.get("json", []) if file.uri.rpartition(".")[0] in stems and base_name(file) not in TABLE_NAMES]
    return {known: [file for file in files if file not in sided] for known, files in formats.items()}


def _without_descriptions(rows: dict[str, list[StoredFile]]) -> tuple[dict[str, list[StoredFile]], list[tuple[str, str, str]]]:
    """Without the json files that libraries write about a data set, if there are others."""
    kept = {known: [file for file in files if base_name(file) not in _DESCRIBES_DATA] for known, files in rows.items()}
    if not any(kept.values()):
        return rows, []
    told = [(base_name(file), "not_a_sample", "the file describes the data") for file in rows.get("json", []) if file not in kept["json"]]
    return {known: files for known, files in kept.items() if files}, told


def _unread(formats: dict[str, list[StoredFile]]) -> tuple[tuple[str, str, str], ...]:
    """A line for each sort of file that may hold data and is not read."""
    lines = []
    for ending, files in sorted(formats.items()):
        if ending.removeprefix(".") in _HOLDS_DATA and ending.startswith("."):
            count = Counter(base_name(file) for file in files)
            lines.append((base_name(files[0]), "unsupported", f"{count.total()} files end in {ending}, which is not read here"))
    return tuple(lines)
