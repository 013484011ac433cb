"""The judgements of a stage that its report shows: a fair sample of each task's, with small pictures of the prompts.

Every rank keeps the same sample: which judgements are shown follows from their number, and what they say, with the pictures, comes
from the rank that sampled the responses. The
sample is part of the checkpoint and stands in `calibration.json`, where the report finds it without fetching anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
        wanted: dict[tuple[str, int], tuple[Group, int]] = {}  # (task, place) -> the last response that takes it
        for group in groups:
            for number in range(len(group.rewards)):
                place = self.calibration.place_for_next(group.task)
                if place is not None:
                    wanted[group.task, place] = (group, number)
        said, pictures = {}, {}
        for key, (group, number) in wanted.items():
            if group.whole:
                said[key] = judgement_of(group, number, iteration)
                if said[key].seen:
                    pictures[said[key].seen] = self._pictures_of(group.responses[number].observed.images)
        hands = gather_objects((said, pictures), context)
        for (_, place), judgement in sorted((item for hand, _ in hands for item in hand.items()), key=lambda item: item[0]):
            self.calibration.put(place, judgement)
        shown = {one.prompt_id for kept in self.calibration.shown.values() for one in kept}
        here = {_name(group): prompts[group.drawn] for group in groups if group.drawn in prompts}
        mine = {name: self._pictures_of(here[name].images) for name in sorted(shown - self.pictures.keys()) if name in here}
        found = {name: one for hand in gather_objects(mine, context) for name, one in hand.items()}
        found |= {name: one for _, hand in hands for name, one in hand.items()}
        shown |= {one.seen for kept in self.calibration.shown.values() for one in kept}
        self.pictures = {name: one for name, one in (self.pictures | found).items() if name in shown}

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


def judgement_of(group: Group, number: int, iteration: int) -> Shown:
    """That on response `number` of the group; long texts keep their beginning and end."""
    reward, observed = float(group.rewards[number]), group.responses[number].observed
    judged = reward == reward  # NaN: no reward
    failed = int(np.isnan(group.rewards[:number]).sum())  # responses before it that have none
    return Shown(
        task=group.task,
        prompt_id=_name(group),
        prompt=shortened(group.question),
        response=shortened(group.texts[number]),
        solution=shortened(group.solution),
        value=reward if judged else None,
        failure=None if judged else shortened(group.failures[failed]),
        reasons={rule: shortened(said) for rule, said in group.reasons[number].items()},
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
