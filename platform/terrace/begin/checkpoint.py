"""Looking at a model directory in the hub's layout: is it one, of which family, how large, and do its weights fit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from terrace.begin.decide import Checkpoint
from terrace.begin.place import check_place
from terrace.data.family import configuration, directory_family
from terrace.data.tokenizer import TextTokenizer, load_tokenizer
from terrace.errors import InputError
from terrace.families.configurations import language_config
from terrace.recipe.schema import Model
from terrace.storage.files import absolute, is_remote, join, read_file


def look_at_checkpoint(given: str) -> Checkpoint:
    """What a directory or s3:// URI holds. Raises InputError that says what is missing; weights are compared by name and shape."""
    from terrace.models.build import meta_model, model_config
    from terrace.models.weights import initial_weights

    directory = absolute(given)
    check_place(given)
    config = configuration(Model(pretrained=directory, config=None))
    if "model_type" not in config:
        raise InputError(f"{given}: config.json names no model_type; a checkpoint in the layout of the Hugging Face hub is expected")
    section = Model(architecture=str(config["model_type"]), pretrained=directory)
    family = directory_family(directory)
    built = model_config(section)
    skeleton = meta_model(built)
    initial_weights(section, skeleton)  # raises, naming each tensor that is missing or has another shape
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    pixels = None
    if (values := _json(directory, "preprocessor_config.json")) is not None:
        try:
            pixels = family.exported_pixels(values)
        except (KeyError, TypeError, ValueError):
            pixels = None
    longest = int(language_config(built).max_position_embeddings)
    return Checkpoint(directory, section.architecture, family, pixels, longest, parameters)


def tokenizer_of(directory: str) -> TextTokenizer:
    """The checkpoint's tokenizer; of one on S3 its file is brought here."""
    if not is_remote(directory):
        return load_tokenizer(directory)
    folder = Path(tempfile.mkdtemp(prefix="terrace-tokenizer-"))
    (folder / "tokenizer.json").write_bytes(read_file(join(directory, "tokenizer.json")))
    return load_tokenizer(folder)


def _json(directory: str, name: str) -> Any:
    """A JSON file of the directory; None where there is none."""
    try:
        return json.loads(read_file(join(directory, name)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{join(directory, name)} is no JSON: {error}") from error
