"""Stretches of tensors without a model: how they are cut, where they are found again, whole tensors in one place, files of format 1."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as library_save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from thread_ranks import run_threads

from terrace.cluster.local_worker import process_group_backend
from terrace.models.tensor_files import Stretch, TensorFile
from terrace.models.tensor_writing import save_file
from terrace.recipe.schema import Stage
from terrace.storage.run_storage import OnThisDisk
from terrace.train.checkpoint_index import index_of, index_values, joined_index
from terrace.train.hand_over import HeldTensors
from terrace.train.restore import CheckpointReader, newest_complete
from terrace.train.strategies.shards import ReadTogether, divided, even_share, whole_shard
from terrace.worker.context import WorkerContext


def some_tensors(draw: random.Random) -> dict[str, torch.Tensor]:
    shapes = [(), (1,), (7,), (3, 5), (2, 3, 4), (64, 9), (33,)]
    return {f"t{number}": torch.randn(draw.choice(shapes)) for number in range(draw.randint(1, 9))}


@pytest.mark.parametrize("seed", range(20))
def test_what_ranks_hold_alike_is_cut_into_equal_stretches_that_are_found_by_any_others(seed: int):
    draw = random.Random(seed)
    tensors, ranks = some_tensors(draw), draw.choice([1, 2, 3, 8, 32])
    shards = [list(divided((whole_shard(*entry) for entry in tensors.items()), rank, ranks)) for rank in range(ranks)]
    sizes = [sum(len(shard.values) for shard in own) for own in shards]
    assert max(sizes) - min(sizes) <= 1
    written = [{shard.name: (list(shard.shape), shard.start, len(shard.values)) for shard in own} for own in shards]
    index, faults = joined_index((rank, {"weights": own}) for rank, own in enumerate(written))
    assert not faults
    index = index_of(json.loads(json.dumps(index_values(index))))
    held = {(rank, shard.name): shard.values for rank, own in enumerate(shards) for shard in own}
    for name, tensor in tensors.items():
        placed = index["weights"][name]
        assert placed.shape == tuple(tensor.shape)
        first, last = sorted(draw.randint(0, placed.numbers) for _ in range(2))
        parts = [held[rank, name][own.start : own.end] for rank, own in placed.overlapping(Stretch(name, first, last))]
        assert torch.equal(torch.cat([torch.empty(0), *parts]), tensor.reshape(-1)[first:last])


@pytest.mark.parametrize(("written", "words"), [
    ([(0, 4), (4, 4)], "8 of 12 numbers"),
    ([(0, 4), (3, 9)], "wrote from number 3"),
    ([(4, 8)], "wrote from number 4"),
    ([(0, 12), (0, 12)], "wrote from number 0"),
])
def test_numbers_that_nobody_wrote_or_two_did_are_named(written: list[tuple[int, int]], words: str):
    _, faults = joined_index((rank, {"exp_avg": {"a.weight": ([3, 4], *part)}}) for rank, part in enumerate(written))
    assert len(faults) == 1
    assert words in faults[0]
    assert "exp_avg of a.weight" in faults[0]


def test_even_shares_are_all_of_a_tensor():
    for numbers in (0, 1, 5, 64, 1000):
        for ranks in (1, 2, 7, 256):
            shares = [even_share(numbers, rank, ranks) for rank in range(ranks)]
            assert [n for first, last in shares for n in range(first, last)] == list(range(numbers))


def test_a_file_is_what_the_library_writes_and_its_parts_are_read_alone(tmp_path: Path):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
    tensors = {f"t{number}": (torch.randn(3, 5) * 9).to(dtype) for number, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "a ü": torch.arange(4)}
    for metadata in (None, {"format": "pt"}):
        library_save_file(tensors, tmp_path / "theirs.safetensors", metadata=metadata)
        save_file(tensors, tmp_path / "ours.safetensors", metadata)
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    file = TensorFile(tmp_path / "ours.safetensors")
    assert all(torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype for name, tensor in tensors.items())
    wanted = [Stretch("t1", 4, 11), Stretch("t0", 0, 15), Stretch("scalar", 0, 1), Stretch("t4", 3, 3)]
    for stretch, found in zip(wanted, file.stretches(wanted)):
        assert torch.equal(found, tensors[stretch.name].reshape(-1)[stretch.start : stretch.end])


def test_a_checkpoint_of_format_1_is_still_read(tmp_path: Path):
    """Whole tensors, spread over the ranks' files, and no index."""
    folder = tmp_path / "checkpoints" / "step-000004"
    folder.mkdir(parents=True)
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.tensor(1.5)}
    files = {"weights-00000": ["a"], "weights-00001": ["b", "c"], "exp_avg-00001": ["b"]}
    for name, own in files.items():
        library_save_file({one: tensors[one] for one in own}, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": 4, "format_version": 1}))
    facts = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "step": 4, "attempt": 1, "files": facts}))
    assert newest_complete(folder.parent, OnThisDisk()).path == folder
    reader = CheckpointReader(folder, OnThisDisk())
    assert (reader.names("weights"), reader.names("exp_avg"), reader.names("average")) == ({"a", "b", "c"}, {"b"}, set())
    for name, tensor in tensors.items():
        assert torch.equal(reader.read("weights", name), tensor)
    [part] = reader.source("weights").stretches([Stretch("a", 2, 7)])
    assert torch.equal(part, tensors["a"].reshape(-1)[2:7])
    assert load_file(folder / "exp_avg-00001.safetensors")["b"].shape == (5,)


def tensors_of_every_kind() -> dict[str, torch.Tensor]:
    """Numbers of several widths, and fewer of them than there are ranks."""
    return {
        "step": torch.tensor(7), "names": torch.zeros(0, dtype=torch.int64), "table": torch.randn(0, 16), "keys": torch.arange(1001),
        "small": torch.tensor([1.5], dtype=torch.bfloat16), "flags": torch.tensor([True, False]), "queue": torch.randn(65, 33),
    }


def test_ranks_read_together_what_each_gets_whole(tmp_path: Path):
    """In the number format of the file, a scalar and an empty tensor too."""
    folder = tmp_path / "checkpoints" / "step-000004"
    folder.mkdir(parents=True)
    tensors = tensors_of_every_kind()
    save_file(tensors, folder / "objective-00000.safetensors", None)
    (folder / "state.json").write_text(json.dumps({"step": 4}))
    (folder / "index.json").write_text(json.dumps({"objective": {
        name: {"shape": list(tensor.shape), "starts": [0], "ranks": [0]} for name, tensor in tensors.items()
    }}))

    def read(rank: int, ranks: int) -> dict[str, torch.Tensor]:
        reader = CheckpointReader(folder, OnThisDisk())
        source = ReadTogether(reader.source("objective"), reader.names("objective"), WorkerContext(rank=rank, world_size=ranks))
        return {name: source(name) for name in reversed(tensors)}

    for found in run_threads(3, read):
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_one_process_hands_over_what_it_holds():
    tensors = some_tensors(random.Random(3))
    held = HeldTensors((whole_shard(*entry) for entry in tensors.items()), WorkerContext())
    groups = [(0, [name]) for name in tensors]
    for number, found in held.hand_over(groups):
        [(name, tensor)] = found.items()
        assert groups[number][1] == [name]
        assert torch.equal(tensor, tensors[name])
    assert sum(held.bytes_of(name) for name in tensors) == 4 * sum(math.prod(tensor.shape) for tensor in tensors.values())


@pytest.mark.parametrize(("strategy", "gpus", "offload", "expected"), [
    ("fsdp", 1, "cpu", "cuda:nccl,cpu:gloo"), ("fsdp", 0, "cpu", None), ("fsdp", 1, "none", None), ("zero3", 1, "cpu", None),
])
def test_shards_on_the_host_beside_gpus_have_a_group_for_both(strategy: str, gpus: int, offload: str, expected: str | None):
    parallel, resources = (Stage.model_fields[name].annotation for name in ("parallel", "resources"))
    stage = Stage.model_construct(
        parallel=parallel(strategy=strategy, offload_parameters=offload), resources=resources(gpus_per_worker=gpus)
    )
    assert process_group_backend(stage) == expected
