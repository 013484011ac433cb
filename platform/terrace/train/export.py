"""Writing a stage's final directory from what the ranks hold: every rank writes files of whole tensors, and none holds the model.

The tensors are cut into files by their sizes alone, the files are dealt to the ranks, and each rank is handed the tensors of its files
(train.hand_over). A rank has at most one file's tensors in host memory beside a round of the exchange: a file is the model divided by
twice the ranks, but not less than SMALLEST_FILE_BYTES, and not more than four gigabytes or one tensor. Ranks wait for each other's files,
not for one that writes all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from terrace.models.export import FILE_BYTES, ExportFiles, TensorPlan, finish_work, open_work
from terrace.storage.run_storage import RunStorage
from terrace.train.hand_over import HeldTensors
from terrace.worker.collectives import barrier

SMALLEST_FILE_BYTES = 256 * 10**6
Merge = Callable[[Iterable[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]


def export_together(
    held: HeldTensors, sources: Mapping[str, Sequence[str]], merge: Merge, files: ExportFiles, stored: torch.dtype, out_dir: Path,
    storage: RunStorage,
) -> Path:
    """Write a Hugging Face directory; all ranks call it. `sources`: the held tensors that each of the model's comes from, which `merge`
    makes of them. On the disk the directory appears under its name only when it is complete; of a run on S3 each rank brings its own
    files there, and the rest, config.json last, is `publish_final`'s.
    """
    context = held.context
    rank, ranks = context.rank, context.world_size
    made = merge((name, torch.empty(held.shapes[name], device="meta")) for names in sources.values() for name in names)
    shapes = {name: tensor.shape for name, tensor in made}
    total = sum(shape.numel() for shape in shapes.values()) * stored.itemsize
    plan = TensorPlan(files.config, shapes, stored, min(FILE_BYTES, max(SMALLEST_FILE_BYTES, -(-total // (2 * ranks)))))
    names = list(plan.files)
    owners = _dealt({file: sum(shapes[name].numel() for name in plan.files[file]) for file in names}, ranks)
    groups = [(owners[file], sources[name]) for file in names for name in plan.files[file]]
    places = [file for file in names for _ in plan.files[file]]
    stored_elsewhere = storage.uri_of(out_dir) is not None and rank != 0  # ranks of several machines share no disk
    work = out_dir.with_name(f".{out_dir.name}.partial")
    if rank == 0:
        work = open_work(out_dir)
        files.write(work)
        plan.write_index(work)
    elif stored_elsewhere:
        work = open_work(out_dir.with_name(f"{out_dir.name}-rank-{rank:05d}"))
    barrier(context)
    gathered: dict[str, torch.Tensor] = {}
    missing = {file: len(plan.files[file]) for file in names}
    for number, tensors in held.hand_over(groups):
        file = places[number]
        for name, tensor in merge((name, tensors.pop(name)) for name in list(tensors)):
            gathered.update(plan.pieces(name, tensor))
        missing[file] -= 1
        if not missing[file]:
            plan.write_file(work, file, gathered)
            gathered.clear()
            if stored_elsewhere:
                storage.store_file(work / file, out_dir)
                (work / file).unlink()
    if stored_elsewhere:
        work.rmdir()
    barrier(context)
    return finish_work(work, out_dir) if rank == 0 else out_dir


def _dealt(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that writes each file: the largest ones first, each to whoever has least so far."""
    loads = [0] * ranks
    owners = {}
    for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
        owners[file] = loads.index(min(loads))
        loads[owners[file]] += sizes[file]
    return owners
