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


WRITTEN_OUT: dict[str, Callable[[Any, bytes], np.ndarray]] = {
    "kimi_k25": kimi_k25, "gemma3": pillow("Gemma3ImageProcessorPil"), "paligemma": pillow("SiglipImageProcessorPil"),
    "blip_2": pillow("BlipImageProcessorPil"), "instructblip": pillow("BlipImageProcessorPil"),
    "idefics": pillow("IdeficsImageProcessorPil"), "chameleon": middle_of_lanczos,
}  # fmt: skip
