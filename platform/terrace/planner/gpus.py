"""GPUs that a plan can be made for: memory, dense bfloat16 throughput and bandwidth, with the source of each figure.

Throughput is the dense matrix rate (vendors print twice that "with sparsity"). Memory is the nominal size in GiB; what the
driver keeps for itself is part of `planning.memory_margin`. A recipe adds its own under `planning.gpus`.
"""

from __future__ import annotations

import re

from terrace.errors import InputError, nearest
from terrace.recipe.schema import Gpu, Planning


def _gpu(memory_gib: float, bf16_tflops: float, bandwidth_gbs: float, source: str) -> Gpu:
    return Gpu(memory_gib=memory_gib, bf16_tflops=bf16_tflops, bandwidth_gbs=bandwidth_gbs, source=source)


GPUS: dict[str, Gpu] = {
    "a100-40gb": _gpu(40, 312, 1555, "NVIDIA A100 datasheet, SXM4 40 GB"),
    "a100-80gb": _gpu(80, 312, 2039, "NVIDIA A100 datasheet, SXM4 80 GB"),
    "h100-80gb": _gpu(80, 989.4, 3350, "NVIDIA H100 datasheet, SXM5 80 GB"),
    "h100-pcie-80gb": _gpu(80, 756, 2000, "NVIDIA H100 datasheet, PCIe 80 GB"),
    "h200-141gb": _gpu(141e9 / 2**30, 989.4, 4800, "NVIDIA H200 datasheet, SXM 141 GB"),
    "h20-96gb": _gpu(96, 148, 4000, "NVIDIA H20 product brief"),
    "b200-180gb": _gpu(180e9 / 2**30, 2250, 8000, "NVIDIA DGX B200 datasheet, per GPU"),
    "l40s-48gb": _gpu(48, 362, 864, "NVIDIA L40S datasheet"),
    "l4-24gb": _gpu(24, 121, 300, "NVIDIA L4 datasheet"),
    "a10-24gb": _gpu(24, 125, 600, "NVIDIA A10 datasheet"),
    "rtx-4090-24gb": _gpu(24, 165.2, 1008, "NVIDIA Ada architecture whitepaper, FP32 accumulation"),
    "rtx-3090-24gb": _gpu(24, 71, 936, "NVIDIA GA102 whitepaper, FP32 accumulation"),
    "mi250x-gcd-64gb": _gpu(64, 191.5, 1638, "AMD Instinct MI250X datasheet, one of two dies"),
    "mi300x-192gb": _gpu(192, 1307.4, 5300, "AMD Instinct MI300X datasheet"),
}  # fmt: skip


def find_gpu(name: str, planning: Planning) -> Gpu:
    """The GPU of that name from the recipe or the table. Raises InputError with the nearest name."""
    known = {**GPUS, **planning.gpus}
    if name not in known:
        raise InputError(f"GPU `{name}` is not known{nearest(name, known, len(known))} (add it under planning.gpus in the recipe)")
    return known[name]


def gpu_of_device(device_name: str, memory_bytes: float, planning: Planning) -> str | None:
    """The name in the recipe or the table of a device as its driver calls it ("NVIDIA H100 80GB HBM3"); None: not there.

    Every word of the name but its memory and "gcd" must be a word of the driver's; more words win (`h100-pcie` over
    `h100`), then the nearest memory.
    """
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    fitting = []
    for name, gpu in {**GPUS, **planning.gpus}.items():
        needed = {word for word in re.findall(r"[a-z0-9]+", name.lower()) if word != "gcd" and not re.fullmatch(r"\d+gi?b", word)}
        if needed and needed <= words:
            fitting.append((-len(needed), abs(gpu.memory_gib * 2**30 - memory_bytes), name))
    return min(fitting)[2] if fitting else None


def usable_bytes(gpu: Gpu, planning: Planning) -> float:
    """Memory of one GPU that training may fill."""
    return gpu.memory_gib * 2**30 * (1 - planning.memory_margin)
