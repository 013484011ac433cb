"""Writing WebDataset tars that any of its readers can read: `<key>.json` (the canonical sample), `<key>.0.jpg`, `<key>.1.png`, ..."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

from terrace.data.sources.refusals import Refusal
from terrace.data.types import Sample

CANONICAL_VERSION = 1  # `terrace` in a sample's JSON member
_EXTENSION_OF_MAGIC = (
    (b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"), (b"MM\0*", "tif"),
)  # fmt: skip


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
    if plain == sample_id and not (plain.startswith("__") and plain.endswith("__")):
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
        self._keys: dict[str, int] = {}  # samples may share an id; their members may not share a name
        self.samples = 0

    @property
    def size(self) -> int:
        return self._tar.offset

    def add(self, sample: Sample, images: list[bytes]) -> None:
        suffixes = [f"{number}.{image_extension(data)}" for number, data in enumerate(images)]
        text = sample_json(sample, suffixes)  # before anything is written: a refusal leaves no half sample
        key = member_key(sample.id)
        count = self._keys[key] = self._keys.get(key, 0) + 1
        if count > 1:
            key = member_key(f"{key} {count}")
        for suffix, data in (("json", text), *zip(suffixes, images)):
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size = len(data)
            self._tar.addfile(header, io.BytesIO(data))
        self.samples += 1

    def close(self) -> None:
        self._tar.close()
