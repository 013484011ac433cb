"""What a step reports of itself: FLOPs, MFU, memory, communication; and how running out of memory is explained."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packs import ALL_PARTS, pack_segments, random_pack, segment, tiny_recipe
from ranks import memory_feed, stage_dir, train, train_stages
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, model_config
from terrace.models.forward import pack_hidden
from terrace.planner.gpus import GPUS, gpu_of_device
from terrace.recipe.schema import Gpu, Planning
from terrace.train.measure import Meter, device_peak
from terrace.train.out_of_memory import OutOfMemory, memory_explained
from terrace.train.profiling import communication, covered
from terrace.worker.context import WorkerContext


def run(tmp_path, recipe):
    train_stages(0, 1, recipe.model_dump(mode="json"), str(tmp_path))
    folder = stage_dir(tmp_path, 0)
    return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- FLOPs and MFU


def counted(recipe, pack, train) -> float:
    """Forward and backward as torch counts them."""
    model = build_model(recipe.model, model_config(recipe.model))
    use_attention(model, "sdpa_segments")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in train))
    batch = to_device(pack, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the only kernel it counts on a CPU
        logits = model.lm_head(pack_hidden(model, batch)[batch.supervised_rows])
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("train", "patterns"),
    [(ALL_PARTS, ("",)), ({"projector": {"lr": 1e-3}}, ("merger",)), ({"language": {"lr": 1e-3}}, ("language_model", "lm_head"))],
)
def test_model_flops_are_those_that_torch_counts(train, patterns):
    recipe = tiny_recipe(train=train)
    pack = random_pack(5, segments=4)
    meter = Meter(model_config(recipe.model), recipe.stages[0], recipe.model, recipe.planning, WorkerContext())
    assert meter.pack_flops(pack) == pytest.approx(counted(recipe, pack, patterns), rel=0.01)


def test_mfu_is_over_the_peak_of_all_workers(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="NVIDIA H200", total_memory=141e9)
    )
    recipe = tiny_recipe(precision="bf16")
    meter = Meter(model_config(recipe.model), recipe.stages[0], recipe.model, recipe.planning, WorkerContext(world_size=4, device="cuda:0"))
    assert meter.values(4 * 989.4e12, 2.0) == {
        "model_flops": 4 * 989.4e12, "flops_per_second": pytest.approx(2 * 989.4e12), "mfu": pytest.approx(0.5)
    }
    for device, precision in (("cpu", "bf16"), ("cuda:0", "fp32")):
        stage = tiny_recipe(precision=precision).stages[0]
        assert device_peak(stage, Planning(), WorkerContext(device=device))[0] is None


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-80gb"), ("NVIDIA H100 PCIe", 79.6, "h100-pcie-80gb"),
        ("NVIDIA H200", 139.7, "h200-141gb"), ("NVIDIA A100-SXM4-40GB", 39.5, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"), ("NVIDIA L40S", 44.5, "l40s-48gb"), ("NVIDIA L4", 22.1, "l4-24gb"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx-4090-24gb"), ("AMD Instinct MI300X", 191.5, "mi300x-192gb"),
        ("AMD Instinct MI250X", 64.0, "mi250x-gcd-64gb"), ("NVIDIA GeForce GTX 1080", 8.0, None),
    ],
)
def test_devices_are_found_by_their_drivers_name(device, gib, name):
    assert gpu_of_device(device, gib * 2**30, Planning()) == name
    assert name is None or name in GPUS


def test_a_device_of_the_recipe_is_found_too():
    planning = Planning(gpus={"x9000": Gpu(memory_gib=10, bf16_tflops=1)})
    assert gpu_of_device("ACME X9000 Turbo", 10 * 2**30, planning) == "x9000"


# ---------------------------------------------------------------- in metrics.jsonl


def test_steps_report_flops_memory_and_traces(tmp_path):
    folder, lines = run(tmp_path, tiny_recipe(budget={"steps": 3}, profile={"steps": [2]}))
    for line in lines:
        assert line["model_flops"] > 1e6
        assert line["flops_per_second"] == pytest.approx(line["model_flops"] / line["step_seconds"])
        assert line["samples_per_second"] == pytest.approx(line["samples"] / line["step_seconds"])
        assert line["memory_peak_bytes"] > 50 * 2**20
        assert "mfu" not in line  # a CPU has no entry in the table
    assert [("communication_share" in line) for line in lines] == [False, True, False]
    traces = list((folder / "profile").iterdir())
    assert [trace.name for trace in traces] == ["step-000002-rank-00000.json.gz"]
    names = {event.get("name") for event in json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]}
    assert "aten::mm" in names


PEAK_SCRIPT = """
import mmap
from terrace.train.measure import take_memory_peak
take_memory_peak("cpu")
before = take_memory_peak("cpu")
block = mmap.mmap(-1, 200 * 2**20)
for place in range(0, len(block), 4096):
    block[place] = 1
with_block = take_memory_peak("cpu")
block.close()
take_memory_peak("cpu")  # its window began with the block
print(with_block - before, with_block - take_memory_peak("cpu"))
"""


def test_the_memory_peak_is_that_of_its_window():
    """In a process of its own: what other tests freed would be used again, and the peak would not rise."""
    done = subprocess.run([sys.executable, "-c", PEAK_SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    rise, fall = map(int, done.stdout.split())
    assert rise > 150 * 2**20
    assert fall > 150 * 2**20


def test_overlapping_spans_are_counted_once():
    assert covered([(0, 10), (5, 12), (20, 21), (6, 7)]) == 13
    assert covered([]) == 0


def test_communication_is_told_from_the_trace():
    def event(name, start, end, device="CPU"):
        kind = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=kind)

    on_cpu = [event("gloo:all_reduce", 0, 200_000), event("aten::mm", 100_000, 900_000)]
    assert communication(on_cpu, 1.0, cuda=False) == {"communication_share": pytest.approx(0.2)}
    on_cuda = [
        event("ncclDevKernel_AllReduce_Sum_f32", 0, 300_000, "CUDA"), event("gemm", 0, 200_000, "CUDA"),
        event("nccl:all_reduce", 0, 900_000),  # the call on the host is not the kernel
    ]
    assert communication(on_cuda, 1.0, cuda=True) == {
        "communication_share": pytest.approx(0.3), "communication_exposed_share": pytest.approx(0.1)
    }


# ---------------------------------------------------------------- out of memory


@pytest.mark.parametrize("place", ["accumulate", "step"])
def test_running_out_of_memory_names_the_pack_and_what_to_change(tmp_path, monkeypatch, place):
    from terrace.train.strategies.ddp import DataParallel

    recipe = tiny_recipe(budget={"steps": 3})
    real, calls = getattr(DataParallel, place), []

    def exhausted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == (6 if place == "accumulate" else 2):  # the second pack of step 2
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return real(self, *arguments, **options)

    monkeypatch.setattr(DataParallel, place, exhausted)
    context = WorkerContext()
    with pytest.raises(OutOfMemory) as caught:
        train(recipe, 0, memory_feed(recipe, 0, context), tmp_path, None, context)
    message = str(caught.value)
    assert message.startswith("stage one, step 2, rank 0: out of memory in ")
    assert "Tried to allocate 9.00 GiB" in message
    assert "stages.one.train.language.activation_checkpointing=true" in message
    assert "GiB)" in message
    if place == "accumulate":
        pack = random_pack(5, with_images=True)
        assert "in forward and backward" in message
        assert f"Pack 5: {pack.tokens} tokens" in message
        assert "3 of mixed" in message
        assert "the longest" in message
        assert "images, the largest" in message
    else:
        assert "in the optimizer step" in message


def test_other_errors_are_left_alone_and_the_hosts_allocator_is_understood():
    recipe = tiny_recipe()
    around = ("forward and backward", 1, recipe.stages[0], model_config(recipe.model), WorkerContext())
    with pytest.raises(RuntimeError, match="shapes differ") as caught, memory_explained(*around):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, OutOfMemory)
    pack = pack_segments(1, [segment(np.random.default_rng(0), 20)])
    with pytest.raises(OutOfMemory, match="Pack 1: 20 tokens"), memory_explained(*around, pack):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried ...")
