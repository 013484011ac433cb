"""The corpus of `bench_data.py`: photograph-like JPEGs with captions, the same bytes every time, in each loader's own format.

A picture is noise at five scales, from large coloured shapes down to grey texture: 640x480 give or take a fifth, 60 to 120 kB at
quality 91, like a photograph of that size and unlike plain noise, which would decode twice as slowly.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from terrace.families.qwen2_5_vl import Qwen25VL

FAMILY = Qwen25VL()

SAMPLES_PER_SHARD = 500
VERSION = 2  # of the corpus: another one is written beside it
SUBJECTS = "dog cat river bridge market train harbour child musician tower garden horse bicycle lighthouse storm kitchen"
QUALITIES = "small red quiet old wooden bright crowded empty distant golden wet striped curious broken heavy blue"
ACTIONS = "stands waits runs leans rests shines moves turns sleeps drifts looks rises"
PLACES = "beside the road, under a grey sky, near the water, in front of a house, between two trees, at the edge of town"


def textures() -> np.ndarray:
    """Grey noise at four scales, float32 [8, 1152, 1152]: pictures are cut out of it, which is ten times faster than drawing each."""
    random = np.random.default_rng(VERSION)
    side, tiles = 1_152, np.zeros((8, 1_152, 1_152), np.float32)
    for tile in tiles:
        for cell, strength in ((48, 30.0), (16, 16.0), (5, 10.0), (2, 7.0)):
            grid = random.standard_normal((side // cell + 1, side // cell + 1), dtype=np.float32)
            tile += strength * np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))
    return tiles


def picture(random: np.random.Generator, tiles: np.ndarray) -> bytes:
    """One JPEG."""
    width, height = (int(side * random.uniform(0.8, 1.2)) for side in (640, 480))
    if random.random() < 0.3:
        width, height = height, width
    image = np.empty((height, width, 3), np.float32)
    coarse = random.standard_normal((6, 6, 3), dtype=np.float32)
    for band in range(3):  # large shapes have colour, texture is mostly grey, as in photographs
        image[:, :, band] = np.asarray(Image.fromarray(55 * coarse[:, :, band]).resize((width, height), Image.Resampling.BICUBIC))
    for strength in (random.uniform(0.7, 1.1), random.uniform(0.1, 0.4)):
        top, left = (int(random.integers(1_152 - side)) for side in (height, width))
        cut = tiles[int(random.integers(len(tiles))), top : top + height, left : left + width]
        image += np.float32(strength) * cut[:: random.choice((-1, 1)), :: random.choice((-1, 1)), None]
    buffer = io.BytesIO()
    Image.fromarray((image + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=91)
    return buffer.getvalue()


def caption(random: np.random.Generator) -> str:
    """One to four sentences."""

    def words(text: str, between: str = " ") -> str:
        choices = text.split(between)
        return choices[int(random.integers(len(choices)))]

    return " ".join(
        f"A {words(QUALITIES)} {words(SUBJECTS)} {words(ACTIONS)} {words(PLACES, ', ')}, {int(random.integers(2, 90))} steps away."
        for _ in range(int(random.integers(1, 5)))
    )


def make_corpus(folder: Path, samples: int) -> Path:
    """`folder/<version>-<samples>` with `tars/`, `parquet/` and `tokenizer/`, written once."""
    root = folder / f"{VERSION}-{samples}"
    if (root / "done.json").is_file():
        return root
    for name in ("tars", "parquet"):
        (root / name).mkdir(parents=True, exist_ok=True)
    captions, sizes, tiles = [], [], textures()
    for shard, start in enumerate(range(0, samples, SAMPLES_PER_SHARD)):
        rows = []
        for number in range(start, min(samples, start + SAMPLES_PER_SHARD)):
            random = np.random.default_rng([VERSION, number])
            rows.append((f"{number:06d}", picture(random, tiles), caption(random)))
        _write_tar(root / "tars" / f"{shard:05d}.tar", rows)
        _write_parquet(root / "parquet" / f"{shard:05d}.parquet", rows)
        captions += [text for _, _, text in rows]
        sizes += [len(data) for _, data, _ in rows]
    from terrace.data.tokenizer import train_tokenizer

    train_tokenizer(captions, 2_048, root / "tokenizer", FAMILY)
    facts = {"samples": samples, "mean_jpeg_bytes": sum(sizes) // len(sizes), "smallest": min(sizes), "largest": max(sizes)}
    (root / "done.json").write_text(json.dumps(facts))
    return root


def _write_tar(path: Path, rows: list[tuple[str, bytes, str]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, data, text in rows:
            for suffix, content in (("jpg", data), ("txt", text.encode())):
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def _write_parquet(path: Path, rows: list[tuple[str, bytes, str]]) -> None:
    """As Hugging Face stores images: a struct of bytes and path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": data, "path": f"{key}.jpg"} for key, data, _ in rows]
    pq.write_table(pa.table({"image": images, "text": [text for _, _, text in rows]}), path, row_group_size=100)


def tar_samples(root: Path) -> Iterator[tuple[bytes, str]]:
    """(JPEG bytes, caption) of every sample, in the order of the tars."""
    for path in sorted((root / "tars").glob("*.tar")):
        with tarfile.open(path) as tar:
            waiting = b""
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".jpg"):
                    waiting = file.read()
                else:
                    yield waiting, file.read().decode()
