"""WebDataset tars: writing them, walking through them with byte offsets, and turning a group of members into a sample.

Members of one sample lie next to each other and share the name up to the first dot (the key); the rest is the suffix. A shard that
Terrace writes holds `<key>.json` (the canonical sample) and `<key>.0.jpg`, `<key>.1.png`, ...: any WebDataset reader can read it. Of
tars found in the wild the usual suffixes are understood: images by extension, `txt`, `caption` and `json`; other members are left
out. One function, `sample_of_members`, reads both, at index time and at training time.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.data.images import IMAGE_EXTENSIONS
from terrace.data.sources.conventions import ImageReference, convert_row
from terrace.data.sources.refusals import Refusal
from terrace.data.types import Sample
from terrace.recipe.schema import Storage
from terrace.storage.files import DEFAULT_STORAGE, open_sequential

CANONICAL_VERSION = 1  # `terrace` in a sample's JSON member
TEXT_SUFFIXES = ("json", "txt", "caption", "text")
_EXTENSION_OF_MAGIC = (
    (b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"), (b"MM\0*", "tif"),
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One file of a shard and its place in bytes."""

    suffix: str
    offset: int
    size: int
    crc: int  # CRC-32 of the bytes


@dataclass
class Group:
    """The members of one sample, with their bytes."""

    key: str
    members: list[Member]
    data: dict[str, bytes]


# ---------------------------------------------------------------- writing


def sample_json(sample: Sample, image_suffixes: list[str]) -> bytes:
    """The canonical JSON member. Raises Refusal for text that is no Unicode (lone surrogates)."""
    value = {
        "terrace": CANONICAL_VERSION, "id": sample.id, "kind": sample.kind, "messages": sample.messages,
        "metadata": sample.metadata, "images": image_suffixes,
    }  # fmt: skip
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        raise Refusal("bad_row", f"the row's text cannot be written as UTF-8 JSON ({error})") from error


def member_key(sample_id: str) -> str:
    """A sample id as a tar name: letters, digits, `-` and `_`, and a short hash wherever that changed something."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", sample_id)[:64]
    if plain == sample_id:
        return plain
    return f"{plain}-{hashlib.blake2b(sample_id.encode('utf-8', 'surrogatepass'), digest_size=5).hexdigest()}"


def image_extension(data: bytes) -> str:
    """The extension that the bytes themselves ask for."""
    if data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return "avif"
    return next((extension for magic, extension in _EXTENSION_OF_MAGIC if data.startswith(magic)), "ppm")


class ShardWriter:
    """Writes one tar. The same samples give the same bytes: no times, no owners."""

    def __init__(self, path: Path):
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.samples = 0

    @property
    def size(self) -> int:
        return self._tar.offset

    def add(self, sample: Sample, images: list[bytes]) -> None:
        suffixes = [f"{number}.{image_extension(data)}" for number, data in enumerate(images)]
        text = sample_json(sample, suffixes)  # before anything is written: a refusal leaves no half sample
        key = member_key(sample.id)
        for suffix, data in (("json", text), *zip(suffixes, images)):
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size = len(data)
            self._tar.addfile(header, io.BytesIO(data))
        self.samples += 1

    def close(self) -> None:
        self._tar.close()


# ---------------------------------------------------------------- reading


def scan_shard(uri: str, storage: Storage = DEFAULT_STORAGE) -> Iterator[Group]:
    """Every sample group of a tar in order. Raises Refusal(unreadable_shard | unsupported) where it cannot go on.

    Holds one group at a time. Everything is read once, in order, because the index stores checksums.
    """
    try:
        with open_sequential(uri, storage) as file:
            start = file.read(6)
            if start[:2] == b"\x1f\x8b" or start[:4] in (b"\x28\xb5\x2f\xfd", b"BZh9") or start == b"\xfd7zXZ\0":
                raise Refusal(
                    "unsupported",
                    "the shard is compressed, so its samples have no byte offsets; decompress it (`gunzip`): its images are"
                    " compressed already",
                )
            file.seek(0)
            yield from _groups(file)
    except tarfile.TarError as error:
        raise Refusal("unreadable_shard", str(error) or type(error).__name__) from error
    except FileNotFoundError as error:
        raise Refusal("unreadable_shard", "the file is gone") from error


def _groups(file: Any) -> Iterator[Group]:
    group: Group | None = None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (header := tar.next()) is not None:
            tar.members = []  # tarfile would keep every header of the shard
            if not header.isreg():
                continue
            folder, _, base = header.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            key, suffix = (f"{folder}/{stem}" if folder else stem), suffix.lower()
            if not suffix or not stem:
                continue
            if group is not None and (group.key != key or suffix in group.data):
                yield group
                group = None
            file.seek(header.offset_data)
            data = file.read(header.size)
            if len(data) < header.size:
                raise Refusal("unreadable_shard", f"it ends inside {header.name}")
            if group is None:
                group = Group(key, [], {})
            group.members.append(Member(suffix, header.offset_data, header.size, zlib.crc32(data)))
            group.data[suffix] = data
    if group is not None:
        yield group


def is_image_suffix(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_EXTENSIONS


def sample_of_members(key: str, data: dict[str, bytes], default_id: str, kind: str) -> tuple[Sample, list[str]]:
    """The sample of a group, and the suffixes of its images in the order of its image numbers. Raises Refusal."""
    row: dict[str, Any] = {}
    if "json" in data:
        row = _json_row(data["json"])
        if row.get("terrace") == CANONICAL_VERSION:
            sample = Sample(row["id"], row["kind"], row["messages"], row.get("metadata", {}))
            missing = [suffix for suffix in row["images"] if suffix not in data]
            if missing:
                raise Refusal("missing_image", f"the shard holds no {key}.{missing[0]}")
            return sample, row["images"]
    suffixes = sorted((suffix for suffix in data if is_image_suffix(suffix)), key=_natural)
    own_text = next((data[suffix] for suffix in TEXT_SUFFIXES[1:] if suffix in data), None)
    conversation = any(name in row for name in ("messages", "conversations", "conversation", "content", "texts"))
    if own_text is not None and not conversation:
        row = {name: value for name, value in row.items() if name not in ("caption", "captions")}
        row["text"] = _decoded(own_text)
    sample, references = convert_row(_with_images(row, suffixes, conversation), default_id, kind)
    return sample, _matched(key, references, suffixes)


def used_suffixes(data: dict[str, bytes], images: list[str]) -> list[str]:
    """The members that `sample_of_members` reads: texts and the sample's images."""
    return [suffix for suffix in data if suffix in TEXT_SUFFIXES or suffix in set(images)]


def _with_images(row: dict[str, Any], suffixes: list[str], conversation: bool) -> dict[str, Any]:
    """The row with the group's images, unless it names images itself."""
    names_images = any(row.get(name) for name in ("image", "images"))
    if not names_images and conversation:
        turns = row.get("messages") or row.get("conversations") or [{"content": row.get("content")}]
        contents = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, dict)]
        parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
        names_images = any(part.get("image") or part.get("image_url") for part in parts)
    if names_images:
        return row
    return {name: value for name, value in row.items() if name not in ("image", "images")} | {"images": suffixes}


def _matched(key: str, references: list[ImageReference], suffixes: list[str]) -> list[str]:
    """Each reference's member: by what follows the first dot of its name, or in order if that says nothing and the numbers agree.

    Never by key, so that reading a sample by its byte ranges alone gives the same answer as the walk through the shard.
    """
    names = [(reference.path or "").rpartition("/")[2] for reference in references]
    found = [name if name in suffixes else name.partition(".")[2].lower() for name in names]
    matched = [suffix for suffix in found if suffix in suffixes]
    if len(matched) == len(references):
        return matched
    if len(references) == len(suffixes):
        return suffixes
    raise Refusal("placeholder_mismatch", f"the text names {len(references)} images, the shard holds {len(suffixes)} for {key}")


def _json_row(data: bytes) -> dict[str, Any]:
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal("bad_row", f"the json member cannot be read ({error})") from error
    if isinstance(row, list):
        return {"messages": row} if row and "role" in row[0] else {"conversations": row}
    if not isinstance(row, dict):
        raise Refusal("bad_row", f"the json member is a {type(row).__name__}, not an object")
    return row


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal("bad_row", f"the text is not UTF-8 ({error})") from error


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
