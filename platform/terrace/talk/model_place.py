"""Which directory a command line means by a model. Without torch, so that a wrong name is refused in a moment."""

from __future__ import annotations

from pathlib import Path

from terrace.errors import InputError


def model_directory(path: Path) -> Path:
    """A model directory, or the newest `final/` of a run directory. Raises InputError where there is neither."""
    if str(path).startswith("s3:/"):
        raise InputError(f"{path}: a model is loaded from a folder of this machine; copy the stage's final/ here first")
    if (path / "config.json").is_file():
        return path
    finals = sorted(file.parent for file in path.glob("stages/*/final/config.json"))
    if finals:
        return finals[-1]
    if (path / "recipe.yaml").is_file():
        raise InputError(f"{path}: none of its stages is complete yet; `terrace status {path}` shows where it stands")
    what = "there is no such folder" if not path.exists() else "it is no folder" if not path.is_dir() else "it has no config.json"
    raise InputError(f"{path}: {what}; name a model directory (RUN_DIR/stages/NN-name/final, or a published checkpoint) or a run directory")
