"""What a model directory says about itself in its small files, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

from terrace.errors import InputError


def model_pixels_of(directory: Path) -> tuple[int, int]:
    """(min, max) pixels of a resized image from preprocessor_config.json. Raises InputError where it does not say."""
    if not (directory / "config.json").is_file():
        raise InputError(
            f"{directory}: no config.json; name a model directory, for example RUN_DIR/stages/NN-name/final"
        )
    file = directory / "preprocessor_config.json"
    try:
        values = json.loads(file.read_text())
        size = values.get("size") or {}
        low = values.get("min_pixels") or size["shortest_edge"]
        high = values.get("max_pixels") or size["longest_edge"]
        return int(low), int(high)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: it does not give min_pixels and max_pixels ({error})") from error
