"""The captioner and the filter of a worker, loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from terrace.errors import InputError
from terrace.evaluate.cases import Case
from terrace.evaluate.engine import Model, load_model, use_threads_of_worker
from terrace.evaluate.model_files import model_sight
from terrace.evaluate.replies import Reply, Settings
from terrace.evaluate.vectors import load_vector_model
from terrace.recaption.captions import Models, Write
from terrace.recipe.schema_recaption import Recaption

JUDGES = ("vectors", "matches")


@dataclass(frozen=True)
class OpenModels(Models):
    speaker: Model | None = None

    def close(self) -> None:
        if self.speaker is not None:
            with closing(self.speaker.engine):
                pass


def open_models(wanted: Recaption, settings: Settings, worker: int) -> OpenModels:
    """Raises InputError for a captioner that does not answer, and a filter that compares no picture with a text."""
    device = use_threads_of_worker(worker, settings)
    speaker = judge = None
    if wanted.filter is not None:
        directory = Path(wanted.filter)
        family = model_sight(directory).family
        if family.gives not in JUDGES:
            raise InputError(f"filter {directory}: {family.name} gives {family.gives}; a filter compares a picture with a text")
        judge = load_vector_model(directory, device, settings.precision, settings.batch_size, None).fitting
    if wanted.captioner is not None:
        directory = Path(wanted.captioner)
        family = model_sight(directory).family
        if family.gives != "text":
            raise InputError(f"captioner {directory}: {family.name} gives {family.gives}; a captioner writes text")
        speaker = load_model(directory, device, settings.precision, settings.batch_size, None, settings.engine)
    write = None if speaker is None else writer(speaker, wanted, settings.batch_size)
    return OpenModels(write, judge, speaker)


def writer(speaker: Model, wanted: Recaption, batch_size: int) -> Write:
    """Captions of many pictures, batch by batch."""

    def write(cases: Sequence[Case]) -> list[Reply]:
        replies: list[Reply] = []
        for start in range(0, len(cases), batch_size):
            some = cases[start : start + batch_size]
            replies += speaker.reply(some, wanted.max_new_tokens, wanted.temperature, wanted.top_p, wanted.seed)
        return replies

    return write
