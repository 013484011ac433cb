"""Where things lie in a run directory."""

from __future__ import annotations

from pathlib import Path


def stage_directory(run_dir: Path, stage_index: int, stage: str) -> Path:
    """`RUN/stages/<NN>-<name>`, NN from 01."""
    return Path(run_dir) / "stages" / f"{stage_index + 1:02d}-{stage}"
