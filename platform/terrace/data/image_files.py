"""What an image file says of itself before it is decoded: EXIF orientation, PNG checksums, samples of more than 8 bits.

Read from the bytes by hand, because it is asked of every image: a microsecond or two instead of opening it with Pillow. Orientation is the
number of the EXIF standard: 1 upright, 3 upside down, 6 and 8 lying on its side, 2, 4, 5 and 7 mirrored as well.
"""

from __future__ import annotations

import struct

import numpy as np
from isal.isal_zlib import crc32  # zlib's, at a tenth of its time

from terrace.errors import DamagedData

PNG_HEAD = b"\x89PNG\r\n\x1a\n"
JPEG_HEAD = b"\xff\xd8\xff"
ORIENTATION_TAG = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # width and height change places
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners really have


class ImageDamage(DamagedData):
    """An image that cannot be used; `reason` is a word to count by."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return ImageDamage, (self.reason, self.detail)


def orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, PNG, WebP or TIFF file; 1 where it has none or a senseless one."""
    place = _orientation_place(data)
    if place is None:
        return 1
    at, order, _ = place
    value = int(struct.unpack_from(order + "H", data, at)[0])
    return value if 1 <= value <= 8 else 1


def without_orientation(data: bytes) -> bytes:
    """The same file with its orientation set to upright (`exif: ignore`); every other byte stays."""
    place = _orientation_place(data)
    if place is None or orientation(data) == 1:
        return data
    at, order, chunk = place
    changed = bytearray(data)
    struct.pack_into(order + "H", changed, at, 1)
    if chunk is not None:  # PNG: the chunk's checksum
        start, size = chunk
        struct.pack_into(">I", changed, start + 8 + size, crc32(changed[start + 4 : start + 8 + size]))
    return bytes(changed)


def upright(image: np.ndarray, turned: int) -> np.ndarray:
    """uint8 [H, W, 3] of stored pixels as they are to be seen."""
    if turned in (5, 7):
        image = image.transpose(1, 0, 2)
        return image if turned == 5 else image[::-1, ::-1]
    if turned in (6, 8):
        return np.rot90(image, -1 if turned == 6 else 1)
    return {2: image[:, ::-1], 3: image[::-1, ::-1], 4: image[::-1]}.get(turned, image)


def check_file(data: bytes) -> None:
    """Raises ImageDamage for a file that is cut, or a PNG whose checksums are wrong, without decoding anything.

    Catches no flipped bit inside a JPEG, which has no checksums.
    """
    cut = ImageDamage("truncated_image", "the file ends before the image does")
    if data[:3] == JPEG_HEAD:
        if data.rfind(b"\xff\xd9", max(0, len(data) - 65_536)) < 0:
            raise cut
    elif data[:8] == PNG_HEAD:
        _check_png(data, cut)
    elif data[8:12] == b"WEBP" and len(data) < int.from_bytes(data[4:8], "little") + 8:
        raise cut


def deep_to_8_bits(values: np.ndarray, declared: int | None) -> np.ndarray:
    """Samples of up to 16 bits to uint8 by the depth that they really have.

    `declared`: significant bits that the file states (PNG's sBIT). A camera's 12 bits in a 16-bit file would otherwise be a black picture.
    Raises ImageDamage for samples that are no 16-bit numbers.
    """
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high > 65_535:
        raise ImageDamage("not_an_image", f"its samples reach from {low} to {high}: no grey levels of 16 bits; convert it to 8 bits")
    stated = declared if declared is not None and high < 1 << declared else None if declared is None else 16
    depth = stated if stated is not None else next(bits for bits in DEPTHS if high < 1 << bits)
    return (values << 8 >> depth if depth < 8 else values >> (depth - 8)).astype(np.uint8)


def float_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Float samples between 0 and 1, or 0 and 255, to uint8. Raises ImageDamage for any others: their scale is not known."""
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if not np.isfinite(values).all() or low < 0 or high > 255:
        raise ImageDamage("not_an_image", f"its float samples reach from {low:g} to {high:g}, not to 1 or 255; convert it to 8 bits")
    return np.round(values * 255 if high <= 1 else values).astype(np.uint8)


def significant_bits(data: bytes) -> int | None:
    """The bits of a grey PNG's sBIT chunk."""
    found = next((start for name, start, _ in _png_chunks(data) if name == b"sBIT"), None) if data[:8] == PNG_HEAD else None
    return None if found is None else max(1, min(16, data[found + 8]))


def is_deep_colour(data: bytes) -> bool:
    """Whether the file is a PNG of 16 bits a sample in several channels, of which decoders keep the upper 8 bits."""
    return data[:8] == PNG_HEAD and data[24:25] == b"\x10" and data[25:26] in (b"\x02", b"\x04", b"\x06")


# ---------------------------------------------------------------- places in the bytes

_SEGMENT = struct.Struct(">BBH").unpack_from  # of a JPEG: 0xFF, the marker, and its length with these two bytes
Place = tuple[int, str, tuple[int, int] | None]  # (byte of the value, struct's byte order, (start, size) of the PNG chunk around it)


def _orientation_place(data: bytes) -> Place | None:
    try:
        if data[:3] == JPEG_HEAD:
            start = _jpeg_exif(data)
            return None if start is None else _in_tiff(data, start, None)
        if data[:8] == PNG_HEAD:
            chunk = next(((start, size) for name, start, size in _png_chunks(data) if name == b"eXIf"), None)
            return None if chunk is None else _in_tiff(data, chunk[0] + 8, chunk)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _in_tiff(data, 0, None)
        if data[8:12] == b"WEBP":
            start = _webp_exif(data)
            return None if start is None else _in_tiff(data, start, None)
    except (struct.error, IndexError):
        pass  # a cut or senseless header: the decoder will say so
    return None


def _jpeg_exif(data: bytes) -> int | None:
    at, last = 2, len(data) - 4
    while at <= last:
        lead, marker, length = _SEGMENT(data, at)
        if lead != 0xFF:
            return None
        if marker == 0xFF:
            at += 1
            continue
        if marker in (0xDA, 0xD9):
            return None
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return at + 10
        at += 2 + length
    return None


def _webp_exif(data: bytes) -> int | None:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return at + 14 if data[at + 8 : at + 14] == b"Exif\0\0" else at + 8
        at += 8 + size + size % 2
    return None


def _in_tiff(data: bytes, start: int, chunk: tuple[int, int] | None) -> Place | None:
    """The orientation in the first directory of a TIFF structure that begins at `start`."""
    order = {b"II": "<", b"MM": ">"}.get(data[start : start + 2])
    if order is None:
        return None
    directory = start + struct.unpack_from(order + "I", data, start + 4)[0]
    count = struct.unpack_from(order + "H", data, directory)[0]
    for entry in range(directory + 2, directory + 2 + 12 * min(count, 512), 12):
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag == ORIENTATION_TAG and kind == 3:
            return entry + 8, order, chunk
    return None


def _png_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """[(name, start, size)] of the chunks before the pixels, and behind them too where they are few."""
    chunks, at = [], 8
    while at + 12 <= len(data) and len(chunks) < 10_000:
        size = int.from_bytes(data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], at, size))
        at += 12 + size
    return chunks


def _check_png(data: bytes, cut: ImageDamage) -> None:
    at, view = 8, memoryview(data)
    while at + 12 <= len(data):
        size, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if at + 12 + size > len(data):
            raise cut
        if crc32(view[at + 4 : at + 8 + size]) != int.from_bytes(data[at + 8 + size : at + 12 + size]):
            raise ImageDamage("truncated_image", f"the checksum of the PNG's {name.decode('latin-1')} chunk is wrong: the file was changed")
        if name == b"IEND":
            return
        at += 12 + size
    raise cut
