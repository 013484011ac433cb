"""A source through ingest and index and back: what tests of the border look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from terrace.data.index.build import build_index
from terrace.data.index.source_index import SourceIndex, load_index
from terrace.data.sources.ingest import ingest_source
from terrace.data.stream.read import read_sample
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.recipe.schema import Data, Source

FAMILY = Qwen25VL()


class Reading:
    """What became of a source: its samples as training reads them, and the lines about refused ones."""

    def __init__(self, uri: Path, out: Path, tokenizer: Any, **fields: Any):
        self.index: SourceIndex | None = None
        self.samples: list[Sample] = []
        self.images: list[list[bytes]] = []
        source = Source(uri=str(uri), **fields)
        data = Data(sources={"s": source})
        try:
            self.report = ingest_source("s", source, data, out, use_ray=False)
            self.index = load_index(build_index("s", source, self.report, tokenizer, FAMILY, use_ray=False), FAMILY)
        except InputError as error:
            self.error = str(error)
        else:
            for row in range(len(self.index)):
                sample, images = read_sample(self.index, row)
                self.samples.append(sample)
                self.images.append(images)
        lines = {path: path.read_text(encoding="utf-8").splitlines() for path in sorted(out.rglob("refused.jsonl"))}
        last = max(lines, key=lambda path: len(path.parts), default=None)  # the index's, which has ingest's too
        self.refused: list[dict[str, str]] = [json.loads(line) for line in lines[last]] if last is not None else []

    @property
    def reasons(self) -> list[str]:
        return [line["reason"] for line in self.refused]

    @property
    def told(self) -> str:
        return "\n".join(f"{line['origin']}: {line['detail']}" for line in self.refused)

    @property
    def words(self) -> list[str]:
        """Each sample as one line: `user: <0>Where?| assistant: [1, 2, 3, 4]`, `(masked)` behind the role of an answer not learnt."""
        return [words(sample) for sample in self.samples]


def words(sample: Sample) -> str:
    turns = []
    for message in sample.messages:
        role = message["role"] + ("(masked)" if message.get("train") is False else "")
        tools = json.dumps(message["tools"]) if "tools" in message else ""
        turns.append(f"{role}: " + "".join(map(_item, message["content"])) + tools)
    return "| ".join(turns).removeprefix("text: ")


def _item(item: dict[str, Any]) -> str:
    kind = item["type"]
    if kind == "text":
        return item["text"]
    if kind == "image":
        return f"<{item['image']}>"
    if kind == "tool_call":
        return f"{item['name']}({json.dumps(item['arguments'])})"
    if kind == "reasoning":
        return f"(thinking: {item['text']})"
    return str(item["frames"] if kind == "video" else item[kind])
