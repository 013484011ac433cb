"""The planner's memory against the resident set of two gloo processes that take the steps, strategy by strategy."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packs import ALL_PARTS, pack_segments, segment, tiny_recipe
from processes import run_ranks
from ranks import Step, memory_feed, train, train_stages

from terrace.planner.memory import PackSize, stage_memory
from terrace.planner.parameters import part_sizes
from terrace.planner.shapes import model_shape
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import bench_train
from train_setup import bench_recipe, small_model

WORKERS, TOKENS, IMAGE_SEGMENTS = 2, 2048, 8
SHAPES = {  # width, layers, vocabulary of language; width, blocks of vision
    "small": (256, 6, 8192, 128, 4),
    "middle": (512, 8, 16384, 256, 6),
}


def sized_model(width: int, layers: int, vocabulary: int, vision_width: int, depth: int) -> dict[str, Any]:
    return {
        "architecture": "qwen2_5_vl",
        "config": {
            "text_config": {
                "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096, "eos_token_id": 502,
                "bos_token_id": 501,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [width // 32, width // 64, width // 64]},
            },
            "vision_config": {
                "depth": depth, "hidden_size": vision_width, "intermediate_size": 4 * vision_width, "num_heads": 4,
                "out_hidden_size": width, "window_size": 112, "fullatt_block_indexes": [1], "patch_size": 14,
                "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
            "image_token_id": 505, "video_token_id": 506, "vision_start_token_id": 503, "vision_end_token_id": 504,
        },
    }  # fmt: skip


def sized_recipe(shape: str, strategy: str, checkpointing: bool) -> Recipe:
    parts = {part: {**values, "activation_checkpointing": checkpointing} for part, values in ALL_PARTS.items()}
    return tiny_recipe(
        model=sized_model(*SHAPES[shape]), train=parts, sequence_length=TOKENS, budget={"steps": 3}, batch={"packs": WORKERS},
        parallel={"strategy": strategy}, loss_chunk_tokens=256, checkpoint={"every_steps": None},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_bytes_of_weights_gradients_and_optimizer_in_bf16(strategy: str) -> None:
    """Every tensor that a rank holds after its last backward, against the plan's share of them."""
    arguments = argparse.Namespace(tiny=False)
    measured = run_ranks(WORKERS, bench_train.strategy_memory, arguments, strategy, timeout=300)[0]
    recipe = bench_recipe(small_model(), 2, WORKERS, 128, precision="bf16", parallel={"strategy": strategy})
    shape = model_shape(recipe)
    memory = stage_memory(shape, recipe.stages[0], WORKERS, PackSize(128, 64, 128), on_gpu=False)
    everything = sum(size.total for size in part_sizes(shape).values())
    bucket = 4 * everything if strategy == "zero3" else 0.0
    planned = (memory.weights + memory.gradients + memory.optimizer + bucket) / everything
    assert measured == pytest.approx(planned, rel=0.03)


def full_pack(number: int) -> Any:
    """TOKENS tokens, of which half are visual."""
    rng = np.random.default_rng(number)
    each = TOKENS // IMAGE_SEGMENTS
    return pack_segments(number, [segment(rng, each - 130, [(8, 16)]) for _ in range(IMAGE_SEGMENTS)], TOKENS)


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def step_memory(rank: int, world_size: int, warm: dict[str, Any], values: dict[str, Any], out: str) -> int:
    """Resident bytes of a process that trained a tiny model, before the steps whose metrics go to `out`/sized."""
    train_stages(rank, world_size, warm, f"{out}/warm")  # what the libraries take by themselves is not the model's
    before = resident_bytes()
    recipe = Recipe.model_validate(values)
    context = WorkerContext(rank, world_size, rank, "cpu", lambda *_: None, lambda: None)

    def stream(start: int) -> Iterator[Step]:
        for step in range(start, int(recipe.stages[0].budget.steps or 0)):
            yield Step(step, [full_pack(2 * step + rank)])

    feed = replace(memory_feed(recipe, 0, context), stream=stream, held_out={})
    folder = Path(out) / "sized"
    folder.mkdir(parents=True, exist_ok=True)
    train(recipe, 0, feed, folder, None, context)
    return before


def peak_of_steps(folder: Path) -> float:
    """The largest `memory_peak_bytes` after the first step, whose own window holds the building of the model."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return max(row["memory_peak_bytes"] for row in rows if row.get("step", 0) > 1 and "memory_peak_bytes" in row)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_peak_of_a_step(shape: str, strategy: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed tensors leave the resident set at once
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    recipe = sized_recipe(shape, strategy, checkpointing)
    warm = tiny_recipe(parallel={"strategy": strategy}, budget={"steps": 2}, batch={"packs": 2}).model_dump(mode="json")
    before = max(run_ranks(WORKERS, step_memory, warm, recipe.model_dump(mode="json"), str(tmp_path), timeout=400))
    peak = peak_of_steps(tmp_path / "sized") - before
    example = full_pack(0)
    pack = PackSize(len(example.input_ids), example.pixels.shape[0] / 4, example.supervised_tokens)
    planned = stage_memory(model_shape(recipe), recipe.stages[0], WORKERS, pack, on_gpu=False)
    parts = {name: round(value / 2**20) for name, value in vars(planned).items()}
    print(f"{shape} {strategy} {checkpointing}: planned {planned.total / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB, {parts}")
    assert planned.total == pytest.approx(peak, rel=0.1), parts
