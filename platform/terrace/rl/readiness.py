"""Before a grpo stage's first step: every prompt that it may draw is read and judged once, without decoding an image.

A row that no reward can judge would else be met at draw time, days in. It refuses the stage by name, or is left out where its
source says `on_unready: skip` and listed in `unready.jsonl`. What was found stands in `ready.json`, so that a stage that goes on
with the same prompts and rewards does not pay twice; rows that were damaged then are looked at again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from terrace.data.stream.read import read_located
from terrace.errors import DamagedData, InputError
from terrace.recipe.schema import Recipe
from terrace.rewards.ready import unready
from terrace.rl.environments import Environments
from terrace.rl.prompts import Drawn, PromptReader
from terrace.storage.durable import json_bytes, write_durably
from terrace.worker.collectives import barrier, from_rank_zero, gather_objects
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)

READY, UNREADY = "ready.json", "unready.jsonl"
JUDGED_AT_ONCE = 64  # prompts of a rank, whose bytes are in memory together
SHOWN_ROWS = 10

Key = tuple[str, int]


@dataclass(frozen=True)
class Row:
    """A row that cannot train, by name. `damaged`: its bytes could not be read, so that nobody knows more."""

    source: str
    row: int
    sample: str
    reason: str
    damaged: bool = False

    def __str__(self) -> str:
        return f"{self.source}/{self.sample}: {self.reason}"


@dataclass(frozen=True)
class Readiness:
    """What finding out needs. `identity` changes with the stage, its prompts and their bytes."""

    recipe: Recipe
    stage_index: int
    indexes: Mapping[str, Any]  # source -> data.index.source_index.SourceIndex
    reader: PromptReader
    keys: Sequence[Key]  # of every prompt that may be drawn, for training or held out
    training: Sequence[Key]
    identity: str

    def unready_rows(
        self, stage_dir: Path, judge: Any, environments: Environments, context: WorkerContext, alive: Callable[[], None]
    ) -> list[Row]:
        """The rows to leave out when they are drawn, the same on every rank. All ranks call it.

        `judge` is `SandboxPool.judge`; `alive` is called before whatever may take long. Raises InputError, or DamagedData where
        nothing but damage stands in the way, naming the first rows.
        """
        known = from_rank_zero(self._known(stage_dir / READY) if context.rank == 0 else None, context)
        settled = [row for row in known or [] if not row.damaged]
        if known is not None and not self._refused(settled):
            asked: Sequence[Key] = [(row.source, row.row) for row in known if row.damaged]
        else:
            settled, asked = [], self.keys
        mine = list(self._problems(asked[context.rank :: context.world_size], judge, environments, alive))
        rows = sorted([*settled, *(row for hand in gather_objects(mine, context) for row in hand)], key=lambda row: (row.source, row.row))
        if refused := self._refused(rows):
            raise self._refusal(refused)
        left_out = [row for row in rows if not row.damaged]
        if context.rank == 0:
            self._tell(rows, len(asked), known is None)
            self._write(stage_dir, rows, left_out)
        barrier(context)
        self._check_any_left({(row.source, row.row) for row in rows})
        return left_out

    # ------------------------------------------------------------ finding

    def _problems(
        self, keys: Sequence[Key], judge: Any, environments: Environments, alive: Callable[[], None]
    ) -> Iterator[Row]:
        rewards = self.recipe.stages[self.stage_index].rewards
        for name, of_source in groupby(keys, key=lambda key: key[0]):
            rows = [row for _, row in of_source]
            for start in range(0, len(rows), JUDGED_AT_ONCE):
                alive()
                chunk = rows[start : start + JUDGED_AT_ONCE]
                locations = [self.indexes[name].location(row) for row in chunk]
                prompts, images, places = [], [], {}
                for location, found in zip(locations, read_located(locations)):
                    if isinstance(found, DamagedData):
                        yield Row(name, location.row, location.id, str(found), damaged=True)
                        continue
                    try:
                        prompts.append(self.reader.for_judging(Drawn((name, location.row), 0), found[0]))
                        images.append(found[1])
                        places[location.id] = location.row
                    except InputError as error:
                        yield Row(name, location.row, location.id, str(error))
                alive()
                judged = [prompt for prompt in prompts if prompt.task not in environments or prompt.task in rewards]
                for problem in unready(judged, rewards, judge):
                    yield Row(name, places[problem.id], problem.id, problem.reason)
                talked = [place for place, prompt in enumerate(prompts) if prompt.task in environments]
                for sample, reason in environments.problems([prompts[place] for place in talked], [images[p] for p in talked], name):
                    yield Row(name, places[sample], sample, reason)

    def _refused(self, rows: Sequence[Row]) -> list[Row]:
        """Those whose source does not say to leave them out."""
        sources = self.recipe.data.sources
        return [row for row in rows if (sources[row.source].on_damage if row.damaged else sources[row.source].on_unready) == "stop"]

    def _check_any_left(self, left_out: set[Key]) -> None:
        for name, keys in groupby(self.training, key=lambda key: key[0]):
            if all(key in left_out for key in keys):
                raise InputError(
                    f"stage {self._stage_name}: no prompt of source {name} can be judged or read, so that leaving them out leaves nothing; "
                    f"see {UNREADY} in the stage's folder and mend the rows or the rewards"
                )

    # ------------------------------------------------------------ words

    @property
    def _stage_name(self) -> str:
        return self.recipe.stages[self.stage_index].name

    def _counted(self, rows: Sequence[Row]) -> str:
        total = Counter(source for source, _ in self.keys)
        found = Counter(row.source for row in rows)
        return ", ".join(f"{count} of {total[name]} prompts of source {name}" for name, count in found.items())

    def _refusal(self, rows: Sequence[Row]) -> InputError | DamagedData:
        unready_rows = [row for row in rows if not row.damaged]
        if not unready_rows:
            lines = [f"stage {self._stage_name}: {self._counted(rows)} cannot be read", *(f"  {row.reason}" for row in rows[:SHOWN_ROWS])]
            return DamagedData("\n".join([*lines, *_more(rows)]))
        names = dict.fromkeys(row.source for row in unready_rows)
        skip = " and ".join(f"`data.sources.{name}.on_unready: skip`" for name in names)
        damaged = [f"{self._counted([row for row in rows if row.damaged])} cannot be read"] if len(rows) > len(unready_rows) else []
        return InputError("\n".join([
            f"stage {self._stage_name}: {self._counted(unready_rows)} cannot be judged; no step was made",
            *damaged,
            *(f"  {row}" for row in [*unready_rows, *(row for row in rows if row.damaged)][:SHOWN_ROWS]),
            *_more(rows),
            f"Mend the rows, or the stage's rewards, and start a new run; or leave them out with {skip} and resume this one",
        ]))  # fmt: skip

    def _tell(self, rows: Sequence[Row], asked: int, first: bool) -> None:
        for what, found in (
            (f"cannot be judged and are left out (`on_unready: skip`); {UNREADY} lists them", [row for row in rows if not row.damaged]),
            ("cannot be read and are left out when drawn (`on_damage: skip`)", [row for row in rows if row.damaged]),
        ):
            if found:
                log.warning("stage %s: %s %s", self._stage_name, self._counted(found), what)
        if first:
            log.info("stage %s: %d prompts judged before the first step", self._stage_name, asked)

    # ------------------------------------------------------------ files

    def _known(self, path: Path) -> list[Row] | None:
        """What an earlier attempt found out about the same prompts, or None."""
        if not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [Row(**row) for row in stored["rows"]] if stored["identity"] == self.identity else None

    def _write(self, stage_dir: Path, rows: Sequence[Row], left_out: Sequence[Row]) -> None:
        lines = [json.dumps({"source": row.source, "sample": row.sample, "reason": row.reason}, ensure_ascii=False) for row in left_out]
        if lines or (stage_dir / UNREADY).exists():
            write_durably(stage_dir / UNREADY, "".join(f"{line}\n" for line in lines).encode())
        write_durably(stage_dir / READY, json_bytes({"identity": self.identity, "rows": [asdict(row) for row in rows]}))


def _more(rows: Sequence[Row]) -> list[str]:
    return [f"  and {len(rows) - SHOWN_ROWS} more"] if len(rows) > SHOWN_ROWS else []


def identity_of(stage_hash: str, order: str, keys: Sequence[Key], indexes: Mapping[str, Any]) -> str:
    """sha256 (hex) of the stage, the fingerprint of its order, the prompts, and the checksums of their sources' files."""
    digest = hashlib.sha256(json_bytes([stage_hash, order, sorted({source for source, _ in keys})]))
    for name in sorted({source for source, _ in keys}):
        digest.update(np.asarray([row for source, row in keys if source == name], np.int64).tobytes())
        digest.update(np.ascontiguousarray(indexes[name].columns["member_crc"]).tobytes())
    return digest.hexdigest()
