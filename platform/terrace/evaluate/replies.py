"""How suites are run, and what a model says to one case."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Reply:
    """What a model says to one case; or, of a loss suite, what was measured."""

    text: str
    tokens: int = 0
    finished: bool = True
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How to run. Nothing here changes a suite's fingerprint except what `Reading` takes."""

    limit: int | None = None
    images_root: Path | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    workers: int = 1
    device: str | None = None
    precision: str | None = None
    pixels: tuple[int, int] | None = None  # (min, max) of a resized image, instead of the model's own
    engine: str = "native"  # or vllm
