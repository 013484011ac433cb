"""Pictures as transformers' own Pillow processors cut them, in the form of a family's rows: what our pixels are held against."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from families import Case
from PIL import Image
from pixel_references import WRITTEN_OUT

PLAIN = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
Rows = np.ndarray  # [rows, values of a row], before rescaling


def published_pixels(case: Case, data: bytes) -> Rows:
    """The picture of a file as the published processor of the case's family cuts it."""
    if case.name in WRITTEN_OUT:
        return WRITTEN_OUT[case.name](case, data)
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return PROCESSORS[case.name](case, image)


def _patches(case: Case, image: np.ndarray) -> Rows:
    patch = case.family.patch
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": case.pixels[0], "longest_edge": case.pixels[1]}, min_pixels=case.pixels[0], max_pixels=case.pixels[1],
    )  # fmt: skip
    return processor([image], **PLAIN)["pixel_values"].reshape(-1, 3, 2, patch, patch)[:, :, 0].reshape(-1, 3 * patch * patch)


def _tiles(processor: Any, case: Case, image: np.ndarray) -> Rows:
    return processor([image], **PLAIN)["pixel_values"].reshape(-1, case.family.row_values)


def _llava(case: Case, image: np.ndarray) -> Rows:
    side = case.family.side
    crop = {"height": side, "width": side}
    return _tiles(transformers.LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": side}, crop_size=crop), case, image)


def _internvl(case: Case, image: np.ndarray) -> Rows:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    size = {"height": case.family.side, "width": case.family.side}
    most = case.family.most_tiles(case.pixels[1])
    return _tiles(GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=most), case, image)


def _llava_next(case: Case, image: np.ndarray) -> Rows:
    side, canvases = case.family.side, [list(canvas) for canvas in case.family.canvases]
    size, crop = {"shortest_edge": side}, {"height": side, "width": side}
    return _tiles(transformers.LlavaNextImageProcessorPil(size=size, crop_size=crop, image_grid_pinpoints=canvases), case, image)


def _onevision(case: Case, image: np.ndarray) -> Rows:
    side, canvases = case.family.side, [list(canvas) for canvas in case.family.canvases]
    size = {"height": side, "width": side}
    processor = transformers.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=canvases, image_mean=[0.5] * 3)
    return _tiles(processor, case, image)


def _minicpm(case: Case, image: np.ndarray) -> Rows:
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    processor = MiniCPMV4_6ImageProcessorPil(max_slice_nums=case.family.most_slices(case.pixels[1]), scale_resolution=case.family.scale)
    rows = processor([image], **PLAIN)["pixel_values"]  # [1, 3, 14, 14 * patches]
    return rows.reshape(3, 14, -1, 14).transpose(2, 0, 1, 3).reshape(-1, 3 * 14 * 14)


def _idefics(case: Case, image: np.ndarray) -> Rows:
    kind, side = f"{case.family.image_processor}Pil", case.family.side
    size = {"longest_edge": case.family.most_along(case.pixels[1]) * side}
    return _tiles(getattr(transformers, kind)(size=size, max_image_size={"longest_edge": side}), case, image)


def _pixtral(case: Case, image: np.ndarray) -> Rows:
    from terrace.families.qwen2_vl import cut_patches

    side = {"height": case.family.factor, "width": case.family.factor}
    size = {"longest_edge": int(case.pixels[1] ** 0.5)}
    planes = transformers.PixtralImageProcessorPil(patch_size=side, size=size)([image], **PLAIN)["pixel_values"][0]
    return cut_patches(planes, case.family.patch, 1)


def _glm(case: Case, image: np.ndarray) -> Rows:
    size = dict(zip(("shortest_edge", "longest_edge"), (2 * bound for bound in case.pixels)))
    return transformers.Glm4vImageProcessorPil(size=size)([image], **PLAIN)["pixel_values"].reshape(-1, 3, 2, 196)[:, :, 0].reshape(-1, 588)


def _fuyu(case: Case, image: np.ndarray) -> Rows:
    (high, wide), patch = case.family.canvas(case.pixels[1]), case.family.patch
    side = {"height": patch, "width": patch}
    processor = transformers.FuyuImageProcessorPil(size={"height": high, "width": wide}, patch_size=side)
    given = processor([image], do_rescale=False, do_normalize=False, return_tensors="pt")
    [planes] = given["images"][0]
    rows, columns = (-(-int(given[f"image_unpadded_{name}"][0][0]) // patch) for name in ("heights", "widths"))
    cut = processor.patchify_image(np.asarray(planes)[:, : rows * patch, : columns * patch])  # values with colours last
    return np.asarray(cut).reshape(rows * columns, patch * patch, 3).transpose(0, 2, 1).reshape(rows * columns, -1)


def _mllama(case: Case, image: np.ndarray) -> Rows:
    side = {"height": case.family.side, "width": case.family.side}
    given = transformers.MllamaImageProcessorPil(size=side, max_image_tiles=case.family.most_tiles)([image], **PLAIN)
    assert case.family.number(*case.family.view(*image.shape[1::-1], case.pixels).facts) == int(given["aspect_ratio_ids"].item())
    return given["pixel_values"].reshape(-1, case.family.row_values)[: int(given["aspect_ratio_mask"].sum())]


PROCESSORS: dict[str, Callable[[Case, np.ndarray], Rows]] = {
    "qwen2_vl": _patches, "qwen2_5_vl": _patches, "qwen3_vl": _patches, "qwen3_vl_moe": _patches, "llava": _llava, "terrace_vlm": _llava,
    "llama_vid": _llava,
    "internvl": _internvl, "llava_next": _llava_next, "llava_onevision": _onevision, "minicpmv4_6": _minicpm, "idefics3": _idefics,
    "smolvlm": _idefics, "mllama": _mllama, "mistral3": _pixtral, "glm4v": _glm, "fuyu": _fuyu,
}  # fmt: skip
