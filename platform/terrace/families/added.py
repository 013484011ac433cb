"""Adapters that a model of parts has inside its tower and language model: what their configuration may say, and what they weigh.

`window_adapters` (Monkey): `attention_rank` and `mlp_rank`, for each window of a picture; `modality_adapters` (LaVIN): `rank`, `groups` and
`temperature`. W is the width of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from terrace.families.interface import Finding

WINDOWS = ("attention_rank", "mlp_rank")
MODALITY = ("rank", "groups", "temperature")
WAYS = 2  # out of a modality adapter's bottleneck


def window_parameters(config: Mapping[str, Any], width: int) -> int:
    """Of one block of the tower, over all windows: query, key and value share what leads into them; each way in has a learned factor."""
    if (options := config.get("window_adapters")) is None:
        return 0
    rows, columns = config["window_grid"]
    return rows * columns * (6 * width * options["attention_rank"] + 2 * width * options["mlp_rank"] + 3)


def window_products(config: Mapping[str, Any], width: int) -> int:
    """Multiply-adds per token in one block; what leads into query, key and value is computed for each of them."""
    if (options := config.get("window_adapters")) is None:
        return 0
    return width * (8 * options["attention_rank"] + 2 * options["mlp_rank"])


def modality_parameters(config: Mapping[str, Any], width: int) -> int:
    """Of one layer."""
    if (options := config.get("modality_adapters")) is None:
        return 0
    rank, groups = options["rank"], options["groups"]
    return width * rank + rank + WAYS * (width * rank // groups + width) + WAYS * width + WAYS


def modality_products(config: Mapping[str, Any], width: int) -> int:
    """Multiply-adds per token in one layer; routers read one vector of a picture, or of a kind of samples, which is not counted."""
    if (options := config.get("modality_adapters")) is None:
        return 0
    return width * (options["rank"] + WAYS * options["rank"] // options["groups"] + WAYS)


def findings(config: Mapping[str, Any], layout: str) -> Iterator[Finding]:
    """What is wrong with either, and with the grid of windows, in a configuration whose parts are complete."""
    grid = config.get("window_grid")
    if layout == "windows":
        if not (isinstance(grid, list | tuple) and len(grid) == 2 and all(isinstance(one, int) and one > 0 for one in grid)):
            yield ("window_grid",), "must be [rows, columns] of windows: the image_layout is `windows`"
        elif grid[0] * grid[1] < 2:
            yield ("window_grid",), "of one window is a square: write image_layout: square"
    elif grid is not None:
        yield ("window_grid",), f"means nothing under image_layout {layout}; write image_layout: windows"
    windows, modality = config.get("window_adapters"), config.get("modality_adapters")
    for name, options, fields in (("window_adapters", windows, WINDOWS), ("modality_adapters", modality, MODALITY)):
        if options is not None and not (isinstance(options, dict) and options.keys() == set(fields)):
            yield (name,), f"must be a map of {', '.join(fields)}"
            return
        for field, value in (options or {}).items():
            whole = field != "temperature"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value <= 0:
                yield (name, field), f"must be a {'whole ' if whole else ''}number above 0, not {value!r}"
                return
    if windows is not None and layout != "windows":
        yield ("window_adapters",), f"needs image_layout: windows, not {layout}"
    if modality is None:
        return
    for other in ("experts", "visual_expert", "window_adapters"):
        if config.get(other):
            yield ("modality_adapters",), f"and {other} do not go together"
    if config["vision_config"].get("model_type") == "siglip_vision_model":
        yield ("modality_adapters",), "needs a tower with a class token, which a router reads: clip_vision_model"
    widths = (modality["rank"], config["vision_config"]["hidden_size"], (config.get("text_config") or {}).get("hidden_size") or 0)
    if any(width % modality["groups"] for width in widths):
        told = f"{modality['groups']} does not divide rank, and the widths of tower and language model: {widths}"
        yield ("modality_adapters", "groups"), told
