"""Whether a checkpoint lies where a command line says. Without torch, so that a wrong name is refused in a moment."""

from __future__ import annotations

import re
from pathlib import Path

from terrace.errors import InputError
from terrace.storage.files import absolute, is_remote

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_place(given: str) -> None:
    """Raises InputError that says what is missing. Places on S3 are looked at when they are read."""
    directory = absolute(given)
    if is_remote(directory):
        return
    path = Path(directory)
    if not path.exists():
        if HUB_NAME.fullmatch(given):
            raise InputError(
                f"{given}: there is no such folder; if it is a name on the hub, fetch it first: hf download {given} --local-dir"
                f" checkpoints/{given.rpartition('/')[2]}"
            )
        raise InputError(f"{given}: there is no such folder; name a checkpoint in the layout of the Hugging Face hub")
    missing = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise InputError(f"{given}: it lacks {', '.join(missing)}; a checkpoint in the layout of the Hugging Face hub is expected")
