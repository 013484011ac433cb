"""Log-probabilities under the stage's first weights: computed once, by sample, kept in checkpoints.

The samples that a stage will see are taken in blocks of `BLOCK` rows, whose packs depend on nothing else, so that values do not depend
on how the work was cut: by ranks, or by an attempt that was killed. Every finished block is a small file below `<stage>/reference/`;
an attempt that begins again from the first weights goes on from there. Checkpoints hold the whole table.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from terrace.errors import TerraceError
from terrace.objectives.answers import AnswerPack
from terrace.storage.durable import json_bytes, write_durably

BLOCK = 64  # rows that are computed and written together
SLOTS = 3  # values of a row: its first answer, its second one, the answer to another prompt
MISMATCHED = SLOTS - 1
Gather = Callable[[Sequence[float]], Any]


class ReferenceTable:
    """name of a row -> float32 [SLOTS]; NaN where the row has no such answer."""

    def __init__(self) -> None:
        self._values: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._values)

    def add(self, names: Sequence[str], values: np.ndarray) -> None:
        """values float32 [len(names), SLOTS]."""
        for name, row in zip(names, values):
            self._values[digest(name)] = row

    def of_answers(self, pack: AnswerPack) -> list[float]:
        """One value per answer. Raises TerraceError for a row that was not there when the table was made."""
        return [float(self._row(name)[slot]) for name, count in zip(pack.names, pack.answers) for slot in range(count)]

    def of_mismatched(self, pack: AnswerPack) -> list[float]:
        return [float(self._row(name)[MISMATCHED]) for name in pack.names]

    def _row(self, name: str) -> np.ndarray:
        found = self._values.get(digest(name))
        if found is None:
            raise TerraceError(
                f"{name}: there is no reference log-probability of this sample: it could not be read when the stage began, or the "
                "data changed since. Begin the stage again with `terrace resume RUN --from STAGE`"
            )
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        values = np.stack(list(self._values.values())) if self._values else np.zeros((0, SLOTS), np.float32)
        return {"names": torch.tensor(list(self._values), dtype=torch.int64), "logprobs": torch.from_numpy(values)}

    def load(self, names: torch.Tensor, values: torch.Tensor) -> None:
        self._values = dict(zip(names.tolist(), values.numpy()))


def digest(name: str) -> int:
    """63 bits of a row's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def compute(
    rows: Sequence[Any], names: Sequence[str], read: Callable[[Sequence[Any]], list[AnswerPack]],
    logprobs: Callable[[AnswerPack], np.ndarray], empty: AnswerPack, gather: Gather, rank: int, ranks: int, folder: Path,
    identity: str, alive: Callable[[], None],
) -> ReferenceTable:  # fmt: skip
    """The table of all `rows`; every rank calls it and gets the whole. Block k is rank k % ranks' work. `logprobs` runs the model:
    every rank calls it equally often, with `empty` where it has nothing."""
    table = ReferenceTable()
    for first in range(0, len(rows), BLOCK * ranks):
        start = first + rank * BLOCK
        own, own_names = rows[start : start + BLOCK], names[start : start + BLOCK]
        file = folder / f"{start // BLOCK:08d}.json"
        values = _stored(file, identity, own_names)
        packs = read(own) if values is None and own else []
        with_mismatched = [part for pack in packs for part in ((pack, pack.mismatched) if pack.mismatched else (pack,))]
        most = int(np.max(gather([float(len(with_mismatched))])))
        found = []
        for place in range(most):
            alive()
            found.append(logprobs(with_mismatched[place] if place < len(with_mismatched) else empty))
        if values is None and own:
            values = _in_slots(own_names, packs, found)
            folder.mkdir(parents=True, exist_ok=True)
            kept = [[None if math.isnan(value) else float(value) for value in row] for row in values]
            write_durably(file, json_bytes({"identity": identity, "names": list(own_names), "logprobs": kept}))
        sent = np.full((BLOCK, SLOTS), np.nan)
        if values is not None:
            sent[: len(values)] = values
        for other, row in enumerate(gather(sent.ravel().tolist())):
            block = names[first + other * BLOCK : first + (other + 1) * BLOCK]
            got = np.asarray(row, np.float32).reshape(BLOCK, SLOTS)[: len(block)]
            here = ~np.isnan(got[:, 0])  # a damaged row has none, and is not trained on either
            table.add([name for name, there in zip(block, here) if there], got[here])
    return table


def forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _in_slots(names: Sequence[str], packs: Sequence[AnswerPack], found: list[np.ndarray]) -> np.ndarray:
    """float32 [len(names), SLOTS] of what the packs, and after each its mismatched one, gave."""
    places = {name: place for place, name in enumerate(names)}
    values, given = np.full((len(names), SLOTS), np.nan, np.float32), iter(found)
    for pack in packs:
        of_answers, start = next(given), 0
        for name, count in zip(pack.names, pack.answers):
            values[places[name], :count] = of_answers[start : start + count]
            start += count
        if pack.mismatched is not None:
            for name, value in zip(pack.mismatched.names, next(given)):
                values[places[name], MISMATCHED] = value
    return values


def _stored(file: Path, identity: str, names: Sequence[str]) -> np.ndarray | None:
    """What an earlier attempt at the same stage computed of a block."""
    if not file.is_file():
        return None
    kept = json.loads(file.read_text())
    if kept["identity"] != identity or kept["names"] != list(names):
        return None
    return np.asarray([[np.nan if value is None else value for value in row] for row in kept["logprobs"]], np.float32)
