"""What a model directory says about itself in its small files, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

from terrace.data.family import directory_family
from terrace.errors import InputError
from terrace.families.interface import Sight


def model_sight(directory: Path) -> Sight:
    """The family of a model directory, and the (min, max) pixels of its preprocessor_config.json.

    Raises InputError where a file does not say.
    """
    family, file = directory_family(directory), directory / "preprocessor_config.json"
    try:
        return Sight(family, family.exported_pixels(json.loads(file.read_text())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: it does not give the pixels of a resized image ({error})") from error
