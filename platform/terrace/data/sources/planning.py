"""A source's files to units of work: files of rows by their spans, image folders and documents by a thousand files at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from terrace.data.images import IMAGE_EXTENSIONS
from terrace.data.sources.formats import Unit, row_units
from terrace.data.sources.listing import SIDE_SUFFIXES, TABLE_NAMES, Listing, base_name, format_of
from terrace.data.sources.llama_factory import entry_units
from terrace.data.sources.readers import table_names
from terrace.recipe.schema import Storage
from terrace.storage.files import StoredFile

FILES_PER_UNIT = 1_000


def plan_units(listing: Listing, root: str, storage: Storage, datasets: Sequence[str] = ()) -> list[Unit]:
    """Cut the files of a listing into units, in order. `datasets`: the entries of a dataset_info.json to read (none: all)."""
    units = [Unit(0, "told", root, (name,), (1,), told=(reason, sentence)) for name, reason, sentence in listing.told]
    for format_name, members in listing.files.items():
        if format_name == "image_folder":
            units += _image_units(members, root, storage)
        elif format_name == "text":
            units += _file_units("text", members, root)
        elif format_name == "llama_factory":
            units += entry_units(members[0], root, storage, tuple(datasets))
        elif format_name != "webdataset":
            for file in members:
                units += row_units(format_name, file, root, storage)
    return [replace(unit, number=number) for number, unit in enumerate(units)]


def _image_units(files: list[StoredFile], root: str, storage: Storage) -> list[Unit]:
    """An image folder: the rows of its metadata tables, and the images that no table names, with what lies beside them."""
    tables = [file for file in files if base_name(file) in TABLE_NAMES]
    beside = [file.uri for file in files if file.uri.rpartition(".")[2].lower() in SIDE_SUFFIXES and file not in tables]
    images = [file for file in files if file.uri.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    units, named = [], set()
    for table in tables:
        for unit in row_units(format_of(table.uri), table, root, storage):
            units.append(unit)
            named |= table_names(unit, storage)
    sided = {uri.rpartition(".")[0] for uri in beside}
    rest = [file for file in images if file.uri not in named or file.uri.rpartition(".")[0] in sided]
    return [*units, *_file_units("image_folder", rest, root, beside, named)]


def _file_units(
    format_name: str, files: list[StoredFile], root: str, beside: list[str] | None = None, named: set[str] | None = None
) -> list[Unit]:
    units = []
    by_stem: dict[str, list[str]] = {}
    for uri in beside or []:
        by_stem.setdefault(uri.rpartition(".")[0], []).append(uri)
    for start in range(0, len(files), FILES_PER_UNIT):
        part = files[start : start + FILES_PER_UNIT]
        near = tuple(uri for stem in dict.fromkeys(file.uri.rpartition(".")[0] for file in part) for uri in by_stem.get(stem, ()))
        names, sizes = tuple(file.uri for file in part), tuple(file.size for file in part)
        described = tuple(name for name in names if named and name in named)
        units.append(Unit(0, format_name, root, names, sizes, beside=near, described=described))
    return units
