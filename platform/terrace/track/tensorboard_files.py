"""TensorBoard's event files, one folder per run below RUN/tensorboard: `tensorboard --logdir RUN/tensorboard` shows them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from terrace.track.series import Dated, RunSpec


class TensorBoardFiles:
    """One writer per run that is open; a later process adds a file of its own beside the earlier ones, as TensorBoard expects."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._specs: dict[str, RunSpec] = {}
        self._writers: dict[str, EventFileWriter] = {}

    def open_run(self, spec: RunSpec) -> None:
        self._specs[spec.key] = spec
        folder = self._folder / spec.name
        if not folder.is_dir():
            self._add(spec.key, Event(wall_time=spec.started or time.time(), summary=Summary(value=[_text("recipe", spec.parameters)])))
            self._writers[spec.key].flush()

    def send(self, key: str, points: list[Dated]) -> None:
        for name, value, at, step in points:
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            self._add(key, Event(wall_time=at or time.time(), step=step, summary=summary))
        self._writers[key].flush()

    def end_run(self, key: str, status: str) -> None:
        if (writer := self._writers.pop(key, None)) is not None:
            writer.close()

    def _add(self, key: str, event: Event) -> None:
        if key not in self._writers:
            self._writers[key] = EventFileWriter(str(self._folder / self._specs[key].name))
        self._writers[key].add_event(event)


def _text(tag: str, value: dict[str, Any]) -> Summary.Value:
    """A text as TensorBoard's page of texts shows it: YAML as a block of code."""
    shown = "".join(f"    {line}\n" for line in yaml.safe_dump(value, sort_keys=False, allow_unicode=True).splitlines())
    plugin = SummaryMetadata.PluginData(plugin_name="text", content=TextPluginData(version=0).SerializeToString())
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[shown.encode()], tensor_shape=shape)
    return Summary.Value(tag=tag, tensor=tensor, metadata=SummaryMetadata(plugin_data=plugin))


def open_client(folder: Path, project: str, warn: Callable[[str], None]) -> TensorBoardFiles:
    return TensorBoardFiles(folder)
