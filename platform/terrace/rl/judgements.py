"""The judgements of a stage that its report shows: a fair sample of each task's, with small pictures of the prompts.

Every rank keeps the same sample, because all of them know all groups; a picture is made by the rank that has read the prompt. The
sample is part of the checkpoint and stands in `calibration.json`, where the report finds it without fetching anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from terrace.data.images import DEFAULT_MAX_IMAGE_PIXELS, decode_image
from terrace.generation.interface import Prompt
from terrace.page import picture_address
from terrace.rl.collect import Group
from terrace.rl.prompts import Drawn
from terrace.storage.durable import json_bytes, write_durably
from terrace.track.calibration import Calibration, Shown, calibration_from, shortened
from terrace.worker.collectives import gather_objects
from terrace.worker.context import WorkerContext

FILE = "calibration.json"
PICTURE_SIDE = 160  # pixels at most
PICTURES_PER_PROMPT = 4


class Judgements:
    """The sample so far: `add` each iteration's groups, `state` for a checkpoint and the file."""

    def __init__(self, seed: int, max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS) -> None:
        self.calibration = Calibration(seed)
        self.pictures: dict[str, list[str]] = {}  # prompt id -> JPEGs as addresses
        self._max_image_pixels = max_image_pixels

    def add(self, groups: Sequence[Group], prompts: Mapping[Drawn, Prompt], iteration: int, context: WorkerContext) -> None:
        """All groups of an iteration (from 1), in the order they were drawn; `prompts` are those of this rank. Every rank calls it."""
        for group in groups:
            self.calibration.add(judgements_of(group, iteration))
        shown = {one.prompt_id for kept in self.calibration.shown.values() for one in kept}
        here = {_name(group): prompts[group.drawn] for group in groups if group.drawn in prompts}
        mine = {name: self._pictures_of(here[name].images) for name in sorted(shown - self.pictures.keys()) if name in here}
        talked = {one.seen for kept in self.calibration.shown.values() for one in kept if one.seen}
        for group in groups if talked else ():
            for number, response in enumerate(group.responses):
                if response.observed is not None and (name := seen_name(group, iteration, number)) in talked:
                    mine[name] = self._pictures_of(response.observed.images)
        shown |= talked
        found = {name: pictures for hand in gather_objects(mine, context) for name, pictures in hand.items()}
        self.pictures = {name: pictures for name, pictures in (self.pictures | found).items() if name in shown}

    def _pictures_of(self, images: Sequence[bytes]) -> list[str]:
        return [thumbnail(image, self._max_image_pixels) for image in images[:PICTURES_PER_PROMPT]]

    def state(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.calibration.state(), "pictures": self.pictures}

    def tensor(self) -> torch.Tensor:
        """The state as a checkpoint keeps it: uint8 [n], JSON."""
        return torch.frombuffer(bytearray(json_bytes(self.state())), dtype=torch.uint8)

    def load(self, tensor: torch.Tensor) -> None:
        """Go on from `tensor()`."""
        state = json.loads(tensor.numpy().tobytes())
        self.calibration, self.pictures = calibration_from(state), state["pictures"]

    def write(self, stage_dir: Path) -> None:
        """The file that the report reads, whole or as it was."""
        write_durably(stage_dir / FILE, json_bytes(self.state()))


def judgements_of(group: Group, iteration: int) -> Iterator[Shown]:
    """One for each response of the group; long texts keep their beginning and end."""
    failures = iter(group.failures)
    for number, (text, reward, reasons) in enumerate(zip(group.texts, group.rewards.tolist(), group.reasons)):
        observed = group.responses[number].observed
        judged = reward == reward  # NaN: no reward
        yield Shown(
            task=group.task,
            prompt_id=_name(group),
            prompt=shortened(group.question),
            response=shortened(text),
            solution=shortened(group.solution),
            value=reward if judged else None,
            failure=None if judged else shortened(next(failures, "")),
            reasons={rule: shortened(said) for rule, said in reasons.items()},
            iteration=iteration,
            seen=seen_name(group, iteration, number) if observed is not None and observed.images else "",
        )


def seen_name(group: Group, iteration: int, number: int) -> str:
    """Names the pictures within response `number` of a group."""
    return f"{_name(group)}#{iteration}.{group.drawn.occurrence}.{number}"


def thumbnail(image: bytes, max_pixels: int) -> str:
    """An image file as the address of a JPEG of at most PICTURE_SIDE pixels a side."""
    picture = Image.fromarray(decode_image(image, max_pixels))
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture_address(picture)


def _name(group: Group) -> str:
    return f"{group.drawn.key[0]}/{group.id}"
