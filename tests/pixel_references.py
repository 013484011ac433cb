"""Pixels of the published processors that cannot run here, or that have another form: written out."""

from __future__ import annotations

import ast
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image

NEEDS_TORCHVISION = ("kimi_k25",)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def function_of(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of transformers that cannot be imported without torchvision, read out of its source."""
    source = (Path(transformers.__file__).parent / module).read_text()
    node = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    space: dict[str, Any] = {"math": math}
    exec(compile(ast.Module([node], []), name, "exec"), space)
    return space[name]


def kimi_k25(case: Any, data: bytes) -> np.ndarray:
    """Resized, padded with black on the right and below, patches in reading order."""
    picture = decoded(data)
    resize = function_of("models/kimi_k25/image_processing_kimi_k25.py", "navit_resize")
    size, (height, width) = resize(*picture.shape[:2], 14, 2, case.pixels[1] // 196, 512)
    resized = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))
    padded = np.zeros((3, height, width), np.uint8)
    padded[:, : size[0], : size[1]] = resized.transpose(2, 0, 1)
    patches = padded.reshape(3, height // 14, 14, width // 14, 14).transpose(1, 3, 0, 2, 4)
    return patches.reshape(-1, 3 * 14 * 14)


def pillow(name: str, **settings: Any) -> Callable[[Any, bytes], np.ndarray]:
    """A processor of transformers for Pillow that gives one tile."""

    def tile(case: Any, data: bytes) -> np.ndarray:
        side = {"height": case.family.side, "width": case.family.side}
        processor = getattr(transformers, name)(size=side, do_rescale=False, do_normalize=False, **settings)
        given = processor([decoded(data)], return_tensors="np")
        return (given if isinstance(given, np.ndarray) else given["pixel_values"]).reshape(-1, case.family.row_values)

    return tile


def middle_of_lanczos(case: Any, data: bytes) -> np.ndarray:
    side = case.family.side
    processor = transformers.ChameleonImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_rescale=False, do_normalize=False
    )
    return processor([decoded(data)], return_tensors="np")["pixel_values"].reshape(-1, case.family.row_values)


def slices(case: Any, data: bytes) -> np.ndarray:
    """MiniCPM-V's overview and slices, each resized on its own from the whole: patches one after another."""
    picture, patch = Image.fromarray(decoded(data)), case.family.patch
    (rows, columns), overview, (high, wide) = published_slices(*picture.size, case.family.scale, patch, case.pixels[1])

    def patches(size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> np.ndarray:
        resized = picture.resize(size[::-1], Image.Resampling.BICUBIC)
        planes = np.asarray(resized.crop(box) if box else resized)
        return np.stack([
            planes[y : y + patch, x : x + patch].transpose(2, 0, 1).reshape(-1)
            for y in range(0, planes.shape[0], patch) for x in range(0, planes.shape[1], patch)
        ])  # fmt: skip

    boxes = [(x * wide, y * high, (x + 1) * wide, (y + 1) * high) for y in range(rows) for x in range(columns)]
    return np.concatenate([patches(overview), *(patches((rows * high, columns * wide), box) for box in boxes)])


def published_slices(width: int, height: int, scale: int, unit: int, most_pixels: int) -> tuple[tuple[int, int], ...]:
    """Grid (rows, columns), overview and slice (height, width) by the rule of the LLaVA-UHD and MiniCPM-V papers, by exhaustion."""
    most = max(1, most_pixels // scale**2)
    wanted = min(math.ceil(width * height / scale**2), most)

    def nearest(side: float) -> int:
        return max(unit, round(side / unit) * unit)

    def fitted(high: float, wide: float, enlarged: bool) -> tuple[int, int]:
        if enlarged or high * wide > scale * scale:
            ratio = wide / high
            high = int(scale / math.sqrt(ratio))
            wide = int(high * ratio)
        return nearest(high), nearest(wide)

    if wanted <= 1:
        return (0, 0), fitted(height, width, True), (0, 0)
    grids = [(n // columns, columns) for n in range(2, most + 1) if abs(n - wanted) <= 1 for columns in range(1, n + 1) if n % columns == 0]
    errors = [abs(math.log(width / height) - math.log(columns / rows)) for rows, columns in grids]
    rows, columns = grids[int(np.argmin(np.round(errors, 12)))]
    part = fitted(max(1, round(height / rows)), max(1, round(width / columns)), True)  # of a side that the grid divides
    return (rows, columns), fitted(height, width, False), part


WRITTEN_OUT: dict[str, Callable[[Any, bytes], np.ndarray]] = {
    "kimi_k25": kimi_k25, "gemma3": pillow("Gemma3ImageProcessorPil"), "paligemma": pillow("SiglipImageProcessorPil"),
    "blip_2": pillow("BlipImageProcessorPil"), "instructblip": pillow("BlipImageProcessorPil"),
    **dict.fromkeys(("idefics", "flamingo"), pillow("IdeficsImageProcessorPil")), "chameleon": middle_of_lanczos,
    "terrace_vlm_any_size": slices,
}  # fmt: skip
