"""Walking through a WebDataset tar with byte offsets: the members of each sample, in the order of the file.

Members of one sample lie next to each other and share the name up to the first dot (the key); the rest is the suffix. Tars as they are
found are read to their last byte: archives joined one behind the other, and links to other members. What cannot be read is a group with its
reason, never a sample with a file less: sparse members, links into nothing, members that come back after their group closed (as archives
sorted by suffix have them), and the last group of an archive that lacks its end mark.
"""

from __future__ import annotations

import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from isal.isal_zlib import crc32

from terrace.data.sources.refusals import Refusal
from terrace.data.sources.unpack import compression
from terrace.recipe.schema import Storage
from terrace.storage.files import open_sequential
from terrace.storage.s3 import DEFAULT_STORAGE

MAX_MEMBER_BYTES = 512 * 2**20  # a larger one is refused unread: a sample's files are held in memory
_BLOCK = 512
_FILE_TYPES = (0, 0x30)  # type flags of an ordinary file
_DESCRIBES_ITSELF = re.compile(r"(^|/)__[^/]*__(/|$)")  # WebDataset's own reader skips such members too
_NO_SAMPLE = ("readme", "license", "licence", "copying", "notice", "changelog", "citation", "authors")
_MOST_LINKS = 8  # followed in a row


class Member(NamedTuple):
    """One file of a shard and its place in bytes."""

    suffix: str
    offset: int
    size: int
    crc: int  # CRC-32 of the bytes


@dataclass
class Group:
    """The members of one sample, with their bytes. `refusal`: why it cannot be used; `again`: what came before under its key neither."""

    key: str
    members: list[Member] = field(default_factory=list)
    data: dict[str, bytes] = field(default_factory=dict)
    refusal: Refusal | None = None
    again: bool = False


class Header(NamedTuple):
    """What a walk needs of a member's header."""

    name: str
    size: int
    offset_data: int
    tar: tarfile.TarInfo | None = None  # of what is not a plain file


def scan_shard(uri: str, storage: Storage = DEFAULT_STORAGE) -> Iterator[Group]:
    """Every sample group of a tar in order. Raises Refusal(unreadable_shard | unsupported) where it cannot go on.

    Holds one group at a time, and the keys of the shard. Everything is read once, in order, because the index stores checksums.
    """
    try:
        with open_sequential(uri, storage) as file:
            if compression(file.read(6)) is not None:
                raise Refusal(
                    "unsupported",
                    "the shard is compressed, so its samples have no byte offsets; decompress it (`gunzip`): its images are"
                    " compressed already",
                )
            yield from _told_apart(_groups(file))
    except tarfile.TarError as error:
        raise Refusal("unreadable_shard", str(error) or type(error).__name__) from error
    except FileNotFoundError as error:
        raise Refusal("unreadable_shard", "the file is gone") from error
    except (ValueError, IndexError, UnicodeError, EOFError) as error:  # tarfile on hostile headers
        raise Refusal("unreadable_shard", f"its headers cannot be read ({type(error).__name__}: {error})") from error


def _told_apart(groups: Iterator[Group]) -> Iterator[Group]:
    """Groups whose key came before: another sample where the suffixes are the same, the rest of that sample where they are not."""
    seen: dict[str, frozenset[str]] = {}
    known: dict[frozenset[str], frozenset[str]] = {}  # few distinct sets: each is held once
    for group in groups:
        suffixes = frozenset(group.data)
        before = seen.get(group.key)
        if before is not None and suffixes and before.isdisjoint(suffixes):
            told = f"the members of `{group.key}` lie apart: {_few(before)} before, {_few(suffixes)} here; sort the archive by name"
            group.refusal, group.again = Refusal("split_sample", told), True
        seen[group.key] = known.setdefault(suffixes, suffixes) if before is None else before | suffixes
        yield group


def _groups(file: Any) -> Iterator[Group]:
    group: Group | None = None
    links = _Links(file)
    try:
        for header in _headers(file):
            name = header.name.removeprefix("./")
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if (header.tar is not None and header.tar.isdir()) or not stem:
                continue  # folders, hidden files
            if "__" in name and (_DESCRIBES_ITSELF.search(folder) or _DESCRIBES_ITSELF.search(stem)):
                continue  # descriptions that WebDataset itself writes
            key, suffix = (f"{folder}/{stem}" if folder else stem), suffix.lower()
            if not name.isprintable() and not _is_text(name):
                yield Group(repr(name), refusal=Refusal("bad_row", f"the member name {name!r} is not UTF-8"))
                continue
            if not suffix or stem.lower() in _NO_SAMPLE:
                yield Group(name, refusal=Refusal("not_a_sample", f"{name} has no suffix of a sample's file, or describes the shard"))
                continue
            if group is not None and (group.key != key or suffix in group.data):
                done, group = group, None
                yield done
            if group is None:
                group = Group(key)
            _add(group, name, suffix, header, file, links)
    except (Refusal, tarfile.TarError) as error:
        if group is not None:
            detail = error.detail if isinstance(error, Refusal) else str(error)
            group.refusal = group.refusal or Refusal("unreadable_shard", f"the archive breaks off in or behind it: {detail}")
            yield group
        raise
    if group is not None:
        yield group


def _add(group: Group, name: str, suffix: str, header: Header, file: Any, links: _Links) -> None:
    """Read a member into its group, or say in the group why not."""
    _, size, offset, tar = header
    try:
        if tar is not None:
            if tar.issparse():
                raise Refusal("unsupported", f"{name} is a sparse member; write the archive without `tar -S`")
            if tar.islnk() or tar.issym():
                offset, size = links.place(tar)
            elif not tar.isreg():
                raise Refusal("unsupported", f"{name} is a device or a pipe, not a file")
        if size > MAX_MEMBER_BYTES:
            raise Refusal("too_large", f"{name} has {size:,} bytes; a member may have {MAX_MEMBER_BYTES:,}")
    except Refusal as refusal:
        group.refusal = group.refusal or refusal
        group.data.setdefault(suffix, b"")
        return
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise Refusal("unreadable_shard", f"it ends inside {name}")
    group.members.append(Member(suffix, offset, size, crc32(data)))
    group.data[suffix] = data


def _headers(file: Any) -> Iterator[Header]:
    """The headers of all archives in the file. Raises Refusal where one is damaged, or the last has no end mark.

    A plain file's header is read here, in a quarter of tarfile's time, which is half of what an index costs; tarfile reads the others.
    """
    at: int | None = 0
    while at is not None:
        file.seek(at)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise Refusal("unreadable_shard", f"the archive has no end mark at byte {at:,}: it was cut at the border of a member")
        header = _plain_header(block, at)
        if header is not None:
            at = header.offset_data + -(-header.size // _BLOCK) * _BLOCK
            yield header
        elif block.count(0) == _BLOCK:
            at = _next_archive(file, at + _BLOCK)
        else:
            file.seek(at)
            tar, at = _tarfile_header(file, at)
            yield Header(tar.name, tar.size, tar.offset_data, tar)


def _plain_header(block: bytes, at: int) -> Header | None:
    """The header of an ordinary file, or None: not one, or not sound."""
    if block[156] not in _FILE_TYPES or block[257:262] != b"ustar":
        return None
    try:
        size, checksum = int(block[124:136].rstrip(b" \0"), 8), int(block[148:156].strip(b" \0"), 8)
        name, prefix = block[:100].partition(b"\0")[0].decode(), block[345:500].partition(b"\0")[0].decode()
    except ValueError:
        return None
    # The lower half of Adler-32 is the sum of the bytes and 1, modulo 65,521 which 256 bytes cannot reach: a twentieth of `sum`'s time.
    lower, upper = zlib.adler32(block[:256]) & 0xFFFF, zlib.adler32(block[256:]) & 0xFFFF
    if checksum != lower + upper - 2 - sum(block[148:156]) + 256:  # its own eight bytes count as blanks
        return None
    if name.endswith("/") or (block[257:265] == b"ustar  \0" and prefix):
        return None
    return Header(f"{prefix}/{name}" if prefix else name, size, at + _BLOCK)


def _tarfile_header(file: Any, at: int) -> tuple[tarfile.TarInfo, int]:
    """The header at a place as tarfile reads it, with long names and attributes, and where the next one begins."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            header = tar.next()
            if header is not None:
                return header, tar.offset
    except tarfile.TarError as error:
        if at == 0:
            raise
        raise Refusal("unreadable_shard", f"the header at byte {at:,} is damaged ({error}); what lies behind it is not read") from error
    raise Refusal("unreadable_shard", f"the header at byte {at:,} is damaged; what lies behind it is not read")


def _next_archive(file: Any, place: int) -> int | None:
    """The place of the next block that is not zero: another archive behind the end of one (`cat a.tar b.tar`)."""
    file.seek(place)
    while block := file.read(_BLOCK * 128):
        if block.strip(b"\0"):
            return place + next(at for at in range(0, len(block), _BLOCK) if block[at : at + _BLOCK].strip(b"\0"))
        place += len(block)
    return None


class _Links:
    """Where the members lie that links point to; the archive is walked a second time when the first link comes."""

    def __init__(self, file: Any):
        self._file = file
        self._places: dict[str, tuple[int, int] | str] | None = None

    def place(self, header: tarfile.TarInfo) -> tuple[int, int]:
        """(offset, size) of the file that a link means. Raises Refusal."""
        if self._places is None:
            self._places = {}
            try:
                for member in _headers(self._file):
                    link = member.tar is not None and (member.tar.islnk() or member.tar.issym())
                    self._places[posixpath.normpath(member.name)] = _target(member.tar) if link else (member.offset_data, member.size)
            except (Refusal, tarfile.TarError):
                pass  # told by the walk itself; what lies before is known
        target: tuple[int, int] | str | None = _target(header)
        for _ in range(_MOST_LINKS):
            if not isinstance(target, str):
                break
            target = self._places.get(target)
        if not isinstance(target, tuple):
            raise Refusal("missing_image", f"{header.name} is a link to {header.linkname}, which the shard does not hold")
        return target


def _target(header: tarfile.TarInfo) -> str:
    """The name that a link points to: from the archive's root for a hard link, from the link's folder for a symbolic one."""
    folder = "" if header.islnk() else posixpath.dirname(header.name)
    return posixpath.normpath(posixpath.join(folder, header.linkname))


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _few(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)[:4])
