"""LLaMA-Factory's `dataset_info.json` as a source: its entries name local files, their columns and the tags of their turns.

Every entry whose file lies beside it is read (`datasets: [name, ...]` of the source chooses among them); entries that live on a hub or are
scripts are told. Column maps are followed exactly: `columns` of alpaca and sharegpt, `tags`, `ranking`, `kto_tag`, `system`, `tools`.
"""

from __future__ import annotations

import json
from typing import Any

from terrace.data.sources.fields import is_empty
from terrace.data.sources.formats import Unit, row_units
from terrace.data.sources.listing import format_of
from terrace.data.sources.refusals import Refusal
from terrace.recipe.schema import Storage
from terrace.storage.files import StoredFile, join, list_files, read_file

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SAME = ("history", "system", "tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag")
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation",
    "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_ROLES = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "observation", "function_tag": "function_call",
          "system_tag": "system"}  # fmt: skip
_KNOWN = ("file_name", "formatting", "columns", "tags", "ranking", "subset", "split", "folder", "num_samples")


def entry_units(index: StoredFile, root: str, storage: Storage, datasets: tuple[str, ...] = ()) -> list[Unit]:
    """The units of the entries' files, in the order of the index; one that says why for an entry that cannot be read."""
    entries = json.loads(read_file(index.uri, storage))
    folder = index.uri.rpartition("/")[0]
    units: list[Unit] = []
    for name, entry in entries.items():
        if datasets and name not in datasets:
            continue
        reason, files = _files(entry, folder, storage)
        if reason:
            units.append(Unit(0, "told", root, (f"{index.uri}:{name}",), (1,), told=("unsupported", f"entry {name}: {reason}")))
        for file in files:
            mapping = json.dumps({key: entry[key] for key in ("formatting", "columns", "tags", "ranking") if key in entry} | {"name": name})
            units += row_units(format_of(file.uri), file, root, storage, mapping)
    for name in datasets:
        if name not in entries:
            units.append(Unit(0, "told", root, (index.uri,), (1,), told=("unsupported", f"there is no entry {name} in {index.uri}")))
    return units


def _files(entry: Any, folder: str, storage: Storage) -> tuple[str, list[StoredFile]]:
    """(why the entry cannot be read, or nothing; its files)."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        return "it names no local file (`file_name`); fetch it first", []
    unknown = [key for key in entry if key not in _KNOWN and not key.endswith("_hub_url")]
    if unknown:
        return f"nobody reads its key `{unknown[0]}`", []
    if not is_empty(entry.get("num_samples")):
        return "`num_samples` draws rows at random; use `max_samples` of the source instead, and take it out", []
    files = list_files(join(folder, entry["file_name"]), storage)
    return ("", files) if files else (f"there is no file {entry['file_name']} beside dataset_info.json", [])


def mapped_row(row: Any, mapping: dict[str, Any]) -> Any:
    """A row under the names that `conventions.py` knows; what the map does not name keeps its own."""
    if not isinstance(row, dict):
        return row
    columns = mapping.get("columns") or {}
    sharegpt = mapping.get("formatting", "alpaca") == "sharegpt"
    wanted = {"messages": "conversations"} if sharegpt else dict(_ALPACA)
    wanted |= {name: name for name in _SAME}
    result = dict(row)
    for column, ours in wanted.items():
        default = {"messages": "conversations"}.get(column, column) if sharegpt else _ALPACA.get(column, column)
        theirs = columns.get(column, default if not columns else None)
        if theirs is None or theirs not in row:
            continue
        value = result.pop(theirs)
        ours = "label" if column == "kto_tag" else ours
        if not is_empty(value):
            result[ours] = value
    if sharegpt and isinstance(result.get("conversations"), list):
        tags = {**_TAGS, **(mapping.get("tags") or {})}
        try:
            result["conversations"] = [_turn(turn, tags) for turn in result["conversations"]]
            for reply in ("chosen", "rejected"):
                if isinstance(result.get(reply), dict):
                    result[reply] = _turn(result[reply], tags)
        except Refusal as refusal:
            return refusal
    return result


def _turn(turn: Any, tags: dict[str, str]) -> Any:
    if not isinstance(turn, dict):
        return turn
    said = turn.get(tags["role_tag"])
    role = next((ours for tag, ours in _ROLES.items() if tags[tag] == said), None)
    if role is None:
        raise Refusal("bad_row", f"a turn has the role {said!r}, which no tag of dataset_info.json names")
    others = {key: value for key, value in turn.items() if key not in (tags["role_tag"], tags["content_tag"])}
    return {**others, "role": role, "content": turn.get(tags["content_tag"])}
