"""What a step did and took: model FLOPs, MFU, peak memory. Costs a millisecond per pack, no synchronisation.

FLOPs are the planner's arithmetic on the very segments and images of each pack: what the mathematics needs, frozen parts
counted forward only, or without the gradient of their weights; what activation checkpointing computes twice is not in
it. MFU (model FLOPs utilisation) is that per second, over the peak of all workers' devices in the planner's table; on a
CPU, or on a device that the table lacks, there is none. Publish it with the table's source (`planner/gpus.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from terrace.data.types import PackedExample
from terrace.families.interface import Family
from terrace.families.registry import make_family
from terrace.families.shapes import ModelShape
from terrace.planner.adapters import with_adapters
from terrace.planner.flops import exact_load, training_flops
from terrace.planner.gpus import find_gpu, gpu_of_device
from terrace.planner.parameters import trained_parts
from terrace.planner.shapes import shape_of_config
from terrace.recipe.schema import Model, Planning, Stage
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)


class Meter:
    """Turns packs and seconds into FLOPs, FLOP/s and MFU for one stage."""

    def __init__(self, config: Any, stage: Stage, model: Model, planning: Planning, context: WorkerContext) -> None:
        self._shape = with_adapters(shape_of_config(config.to_dict(), config.model_type), stage, model, config)
        self._family = make_family(config.model_type, config.to_dict())
        self._trained = trained_parts(stage)
        self._workers = context.world_size
        self.peak_flops, reason = device_peak(stage, planning, context)
        if context.rank == 0:
            log.info("mfu: %s", reason)

    def pack_flops(self, pack: PackedExample) -> float:
        """Model FLOPs of the pack's forward and backward."""
        return pack_model_flops(self._shape, self._family, pack, self._trained)

    def values(self, model_flops: float, seconds: float) -> dict[str, float]:
        """Metrics of a step whose global batch needs `model_flops`."""
        values = {"model_flops": model_flops, "flops_per_second": model_flops / seconds}
        if self.peak_flops is not None:
            values["mfu"] = model_flops / seconds / (self.peak_flops * self._workers)
        return values


def pack_model_flops(shape: ModelShape, family: Family, pack: PackedExample, trained: Sequence[Any]) -> float:
    segments = [end - start for start, end in itertools.pairwise([0, *(int(end) for end in pack.segment_ends)])]
    images = pack.image_facts.tolist() or [family.view(1, 1, (1, 1)).facts]  # the text-only guard's blank image
    pictures = [picture for facts in images for picture in family.tower_pictures(facts)]
    return training_flops(shape, exact_load(shape, segments, pictures, pack.supervised_tokens), trained).model


def device_peak(stage: Stage, planning: Planning, context: WorkerContext) -> tuple[float | None, str]:
    """Dense matrix FLOP/s of one device in the stage's precision (None: not known), and how that was found."""
    if not context.device.startswith("cuda"):
        return None, f"none on device {context.device}, FLOP/s are reported"
    if stage.precision == "fp32":
        return None, "none in fp32, whose peak is not that of the matrix units; FLOP/s are reported"
    properties = torch.cuda.get_device_properties(context.device)
    name = gpu_of_device(properties.name, properties.total_memory, planning)
    if name is None:
        return None, f"none, {properties.name} is not in the table: add it under planning.gpus; FLOP/s are reported"
    gpu = find_gpu(name, planning)
    return gpu.bf16_tflops * 1e12, f"of {gpu.bf16_tflops:g} TFLOP/s ({name}: {gpu.source})"


# ---------------------------------------------------------------- memory


def take_memory_peak(device: str) -> int:
    """Bytes that this process held at most since the last call: on CUDA in PyTorch's allocator, else resident."""
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(peak)
    return _resident_peak()


def _resident_peak() -> int:
    """The kernel's high-water mark, set back where the kernel lets us; else the peak since the process began."""
    status = Path("/proc/self/status")
    if not status.is_file():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) * 1024
