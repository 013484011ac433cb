"""What image files say of themselves: orientation, depth and checksums, against Pillow and hand-made files."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from terrace.data.image_files import ImageDamage, check_file, orientation, without_orientation
from terrace.data.images import decode_image, image_size


def encode(array: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def picture(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], another colour in each corner."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_stand_upright_or_as_they_are_stored(kind: str) -> None:
    """Pillow's own `exif_transpose` is the reference, for all eight orientations."""
    stored = picture(33, 77)
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    plain = decode_image(encode(stored, kind, **options))
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        data = encode(stored, kind, exif=exif, **options)
        assert orientation(data) == number
        wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
        found = decode_image(data)
        assert found.shape == wanted.shape
        assert image_size(data) == (found.shape[1], found.shape[0])
        assert np.abs(found - wanted).max() <= (2 if kind == "JPEG" else 0)
        lying = without_orientation(data)
        check_file(lying)
        assert len(lying) == len(data)
        assert np.array_equal(decode_image(lying), plain)
        assert image_size(lying) == (77, 33)
    assert orientation(data[:40]) == 1  # a header that is cut says nothing
    assert without_orientation(data[:40]) == data[:40]


def test_deep_samples_are_scaled_by_their_depth() -> None:
    def grey(values: np.ndarray, kind: str = "PNG") -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind)
        return decode_image(buffer.getvalue())[..., 0]

    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    for bits in (10, 12, 14, 16):
        values = np.round(ramp * (2**bits - 1)).astype(np.uint16)
        assert np.array_equal(grey(values), values >> (bits - 8)), bits
    assert np.array_equal(grey(np.full((8, 8), 255, np.uint16)), np.full((8, 8), 255))
    for top, scale in ((1.0, 255), (255.0, 1)):
        values = (ramp * top).astype(np.float32)
        assert np.array_equal(grey(values, "TIFF"), np.round(values * scale))
    for wrong in (ramp * 4000, ramp - 1, ramp * np.nan):
        with pytest.raises(ImageDamage, match="float samples"):
            grey(wrong.astype(np.float32), "TIFF")
    with pytest.raises(ImageDamage, match="convert it to 8 bits"):
        grey(np.full((8, 8), 2**20, np.int32), "TIFF")


def test_sbit_says_how_deep_a_dark_picture_is() -> None:
    values = np.full((8, 8), 900, np.uint16)  # dark for 12 bits
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    data = buffer.getvalue()
    chunk = b"sBIT" + bytes([12])
    with_depth = data[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    check_file(with_depth)
    assert decode_image(with_depth)[0, 0, 0] == 900 >> 4
    assert decode_image(data)[0, 0, 0] == 900 >> 2  # by its range: it fits into 10 bits


def test_a_sixteen_bit_colour_picture_is_no_black_one() -> None:
    def colour(high: int) -> bytes:
        rows = b"".join(b"\0" + struct.pack(">3H", high, high // 2, 0) * 4 for _ in range(4))
        parts = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        chunks = (struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts)
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

    assert decode_image(colour(0xF000))[0, 0].tolist() == [0xF0, 0x78, 0]
    with pytest.raises(ImageDamage, match="would be black"):
        decode_image(colour(4000))


def test_png_checksums_are_verified() -> None:
    data = bytearray(encode(picture(40, 40), "PNG"))
    check_file(bytes(data))
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageDamage, match="checksum of the PNG's IDAT"):
        check_file(bytes(data))
    for cut in (bytes(data[:60]), bytes(data[:-12])):
        with pytest.raises(ImageDamage):
            check_file(cut)
