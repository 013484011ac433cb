"""Resize arithmetic, decoding and merge order against the published image processor."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from terrace.data.images import ArrayPicture, ImageDamage, decode_image, image_size, load_pixels, resize_image
from terrace.families.interface import View
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.families.qwen2_vl import smart_resize, smart_resize_many

FAMILY = Qwen25VL()

SIDE = st.integers(1, 5000)


VIEW = View(9 * 12, 4 * 9 * 12, (1, 18, 24), (252, 336), (252, 336))


def patches_of(image: np.ndarray) -> np.ndarray:
    height, width, _ = image.shape
    return FAMILY.pixels(ArrayPicture(image), View(0, 0, (1, height // 14, width // 14), (height, width), (height, width)))


def encode(array: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with some noise: uint8 [height, width, 3]."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) * 3 % 256], axis=-1)
    noise = np.random.default_rng(seed).integers(0, 20, (height, width, 3))
    return np.clip(waves * 0.9 + noise, 0, 255).astype(np.uint8)


@settings(max_examples=300, deadline=None)
@given(SIDE, SIDE, st.sampled_from([(3136, 1003520), (784, 784), (3136, 12544), (200704, 12845056)]))
def test_sizes_equal_the_published_processor(height: int, width: int, pixels: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as published

    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, *pixels)
        return
    expected = published(height, width, 28, *pixels)
    assert smart_resize(height, width, *pixels) == expected
    many = smart_resize_many(np.array([height]), np.array([width]), pixels)
    assert (int(many[0][0]), int(many[1][0])) == expected
    assert FAMILY.view(width, height, pixels).tokens == expected[0] * expected[1] // 784


def test_patches_equal_the_published_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = picture(300, 410)
    height, width = smart_resize(300, 410, 3136, 100_000)
    processor = Qwen2VLImageProcessorPil(do_normalize=False, do_rescale=False, min_pixels=3136, max_pixels=100_000)
    published = processor([Image.fromarray(image)], return_tensors="np")
    assert published["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]
    first_frame = published["pixel_values"].reshape(-1, 3, 2, 14, 14)[:, :, 0].reshape(-1, 588)
    ours = patches_of(resize_image(image, height, width))
    assert np.abs(ours.astype(int) - first_frame.astype(int)).max() <= 1  # torch's kernel against Pillow's
    exact = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    assert np.array_equal(patches_of(exact), first_frame)  # the order itself, bit for bit
    assert np.array_equal(FAMILY.pictures_of(patches_of(exact), (1, height // 14, width // 14))[0], exact)


def test_every_mode_becomes_rgb() -> None:
    image = picture(40, 60)
    red = np.zeros((40, 60, 4), np.uint8)
    red[:, :30] = (255, 0, 0, 255)
    assert np.array_equal(decode_image(encode(image, "PNG")), image)
    composed = decode_image(encode(red, "PNG"))
    assert composed[0, 0].tolist() == [255, 0, 0]
    assert composed[0, 59].tolist() == [255, 255, 255]  # transparent becomes white
    sixteen_bit = decode_image(encode(np.full((40, 60), 0xABCD, np.uint16), "PNG"))
    assert sixteen_bit[0, 0].tolist() == [0xAB] * 3
    palette = Image.fromarray(image).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert np.array_equal(decode_image(buffer.getvalue()), np.asarray(palette.convert("RGB")))
    cmyk = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(cmyk, "JPEG", quality=95)
    assert np.abs(decode_image(cmyk.getvalue()).astype(int) - image).mean() < 6
    webp = decode_image(encode(image, "WEBP", lossless=True))
    assert np.array_equal(webp, image)
    grey = decode_image(encode(image[:, :, 0], "JPEG", quality=95))
    assert grey.shape == (40, 60, 3)


def test_header_size_is_the_decoded_size() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encode(picture(33, 77), kind)
        assert image_size(data) == (77, 33)
        assert decode_image(data).shape == (33, 77, 3)


def test_large_jpegs_are_decoded_at_a_fraction_and_look_the_same() -> None:
    data = encode(picture(1200, 1600), "JPEG", quality=90)
    full = patches_of(resize_image(decode_image(data), 252, 336)).astype(int)
    draft = load_pixels(data, FAMILY, VIEW).astype(int)
    assert np.abs(full - draft).mean() < 1.0
    small = encode(picture(300, 400), "JPEG")
    assert np.array_equal(load_pixels(small, FAMILY, VIEW), patches_of(resize_image(decode_image(small), 252, 336)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_refused(kind: str) -> None:
    data = encode(picture(200, 300), kind)
    with pytest.raises(ImageDamage) as caught:
        decode_image(data[: len(data) * 6 // 10])
    assert caught.value.reason == "truncated_image"


def test_text_and_nothing_are_no_images() -> None:
    for data in (b"hello, this is text", b"", b"<html></html>", b"\xff\xd8\xff", bytes(100)):
        with pytest.raises(ImageDamage) as caught:
            decode_image(data)
        assert caught.value.reason == "not_an_image"


def test_a_bomb_is_refused_from_its_header() -> None:
    bomb = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    place = bomb.index(b"\xff\xc0")
    bomb = bomb[: place + 5] + (10_000).to_bytes(2) + (12_000).to_bytes(2) + bomb[place + 9 :]
    png = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + b"IHDR" + (20_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    for data in (bomb, png, encode(np.zeros((100, 100, 3), np.uint8), "GIF")):
        with pytest.raises(ImageDamage) as caught:
            decode_image(data, max_pixels=9_999)
        assert caught.value.reason == "image_too_large"


def test_hair_thin_images_are_refused() -> None:
    with pytest.raises(ImageDamage) as caught:
        image_size(encode(np.zeros((2, 500, 3), np.uint8), "PNG"))
    assert caught.value.reason == "image_aspect_ratio"
