"""A conversation as a model is asked it: turns with pictures. Pure values; the canonical sample form of the data path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from terrace.data.types import Sample


@dataclass(frozen=True)
class Turn:
    """One turn: what was said, in order; a picture is the bytes of its file."""

    role: str  # system, user, assistant
    content: tuple[str | bytes, ...]


def as_sample(turns: Sequence[Turn], name: str) -> tuple[Sample, list[bytes]]:
    """The turns as a sample whose answer is still to come, and its pictures in order."""
    messages, images = [], []
    for turn in turns:
        items = []
        for part in turn.content:
            if isinstance(part, bytes):
                items.append({"type": "image", "image": len(images)})
                images.append(part)
            else:
                items.append({"type": "text", "text": part})
        messages.append({"role": turn.role, "content": items})
    return Sample(name, "prompt", messages), images
