"""Writes the demo's own corpus: JSON Lines and pictures in the conventions that trainers of vision-language models use.

Every sample has pictures of its own, so that a held-out sample's picture is never seen in training. Several questions about
one picture are one conversation: the picture is encoded once and teaches several answers. The conventions are deliberately
different ones, as in real collections: caption rows, content lists, `messages` with `<image>`, `<bbox>` and `<point>`.

Eighteen thousand samples take about 20 s on two cores and 170 MB.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

from terrace.demo.rows import WRITERS, Row
from terrace.recipe.schema import Source

Drawn = tuple[Row, dict[str, Image.Image]]  # a row, and its pictures by path

VERSION = 8  # of what is drawn: a folder of another one is drawn anew
FOLDER_NAME = "demo-corpus"  # recipes that point into a folder of this name get it drawn

# Samples per file. A file's name and content are the source's; see `jobs/recipes/demo.yaml` for kinds and mixtures.
SAMPLES = {
    "captions": 3600,
    "interleaved": 400,
    "text": 1200,
    "ocr": 2600,
    "grounding": 2400,
    "gui": 1600,
    "qa": 1400,
    "counting": 1400,
    "charts": 1400,
    "reasoning": 1600,
    "albums": 120,
    "pairs": 900,
    "rl/counting": 500,
    "rl/grounding": 500,
    "rl/arithmetic": 500,
    "rl/clicking": 600,
}


def write_corpus(
    folder: Path,
    seed: int = 0,
    samples: dict[str, int] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes `<folder>/<source>.jsonl` and `<folder>/images/...` and returns the folder; sources that are there are left as they are.

    `samples` is the number per source (default `SAMPLES`); `progress(done, total)` is called as samples are written.
    """
    stamp, kind = folder / "corpus.json", {"seed": seed, "version": VERSION}
    drawn = json.loads(stamp.read_text()) if stamp.is_file() else {}
    there = drawn["samples"] if {name: drawn.get(name) for name in kind} == kind else {}
    samples = {source: count for source, count in (SAMPLES if samples is None else samples).items() if there.get(source) != count}
    if not samples:
        return folder
    wanted = {**kind, "samples": {**there, **samples}}
    stamp.unlink(missing_ok=True)
    chunk = 100
    tasks = [
        (folder, source, seed, start, min(start + chunk, count))
        for source, count in samples.items()
        for start in range(0, count, chunk)
    ]
    rows: dict[str, list[str]] = {source: [] for source in samples}
    total, done = sum(samples.values()), 0
    with ProcessPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for task, lines in zip(tasks, pool.map(_write_chunk, tasks)):
            rows[task[1]].extend(lines)
            done += len(lines)
            if progress:
                progress(done, total)
    for source, lines in rows.items():
        (folder / f"{source}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{source}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    stamp.write_text(json.dumps(wanted))
    return folder


def _write_chunk(task: tuple[Path, str, int, int, int]) -> list[str]:
    """Draws samples [start, stop) of one source, writes their pictures, returns their rows as JSON lines."""
    folder, source, seed, start, stop = task
    lines = []
    for row, pictures in draw_rows(source, seed, start, stop):
        for path, picture in pictures.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(folder / path, quality=92, subsampling=0)
        lines.append(json.dumps(row, ensure_ascii=False))
    return lines


def draw_rows(source: str, seed: int, start: int, stop: int) -> Iterator[Drawn]:
    """Rows [start, stop) of a source with their pictures; a row depends on (source, seed, its number) only."""
    # `rl/` prompts point at pictures relative to the file's own folder, as every row here does.
    name = source.rsplit("/", 1)[-1]
    for number in range(start, stop):
        rng = random.Random(f"{seed}/{source}/{number}")
        row, drawn = WRITERS[source](rng)
        paths = [f"images/{name}/{number:05d}{'' if len(drawn) == 1 else f'-{k}'}.jpg" for k in range(len(drawn))]
        row = {"id": f"{name}-{number:05d}", **_fill_paths(row, paths)}
        parent = source.rpartition("/")[0]
        yield row, {(f"{parent}/{path}" if parent else path): scene.picture for path, scene in zip(paths, drawn)}


def _fill_paths(row: Row, paths: list[str]) -> Row:
    """Puts the pictures' paths where the convention wants them; writers name pictures by number."""
    if "image" in row:
        row["image"] = paths[row["image"]]
    if "images" in row:
        row["images"] = [paths[k] for k in row["images"]]
    for content in [row.get("content"), *(m["content"] for m in row.get("messages", []))]:
        if isinstance(content, list):
            for item in content:
                if item["type"] == "image":
                    item["image"] = paths[item["image"]]
    return row


# ---------------------------------------------------------------- for recipes


def drawn_folders(sources: Mapping[str, Source]) -> list[Path]:
    """The folders named `demo-corpus` that sources point into (`.../demo-corpus/<name>.jsonl`, `.../rl/<name>.jsonl`)."""
    parents = {parent for source in sources.values() for parent in Path(source.uri).parents if parent.name == FOLDER_NAME}
    return sorted(parents)


def draw_missing(
    sources: Mapping[str, Source], say: Callable[[str], None], progress: Callable[[int, int], None] | None = None
) -> None:
    """Draws what `sources` point at in folders named `demo-corpus`, unless it is there.

    So that jobs/recipes/demo.yaml, and what extends it, runs on a fresh machine without a step before it.
    """
    for folder in drawn_folders(sources):
        files = [Path(source.uri) for source in sources.values()]
        named = {str(file.relative_to(folder).with_suffix("")) for file in files if folder in file.parents}
        samples = {name: count for name, count in SAMPLES.items() if name in named} or SAMPLES
        if not (folder / "corpus.json").is_file():
            say(f"drawing the demo's corpus into {folder} ({sum(samples.values()):,} samples)")
        write_corpus(folder, samples=samples, progress=progress)
