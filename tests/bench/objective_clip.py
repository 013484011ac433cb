"""A step of a stage of `clip` beside open_clip's own `train_one_epoch`: the same weights, pairs and optimizer, in turns in one process.

open_clip's epoch of one batch runs before each of Terrace's steps, inside the stage's data feed, so both see the same machine at the
same moment. Its pictures are normalised beforehand, its texts are tokens at their full length, as its data loader gives them; Terrace
gets bytes and normalises them within its step. With several packs both run every pack twice (open_clip's --accum-freq).
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from terrace.data.types import PackedExample
from terrace.models.build import build_model, model_config
from terrace.models.families.registry import family_model
from terrace.objectives.clip import Clip
from terrace.objectives.interface import StageFeed, StepExamples
from terrace.recipe.schema import Recipe
from terrace.train.loop import train_stage
from terrace.worker.context import WorkerContext

WARM_STEPS = 2
RATE, DECAY, BETAS, EPSILON, CLIP = 1e-4, 0.2, (0.9, 0.98), 1e-6, 1.0


@dataclass(frozen=True)
class Shape:
    """A CLIP of two transformers, as open_clip's model configurations give it."""

    vision: dict[str, int]  # image_size, patch_size, width, layers
    text: dict[str, int]  # context_length, vocab_size, width, heads, layers
    joint: int
    pairs: int  # of a pack
    mean_text: int | None = None  # tokens of a text; None: all are as long as the context


TEXT = {"context_length": 77, "vocab_size": 49_408, "width": 512, "heads": 8, "layers": 12}
SHAPES = {
    "tiny": Shape(
        {"image_size": 64, "patch_size": 16, "width": 128, "layers": 2},
        {"context_length": 32, "vocab_size": 1_024, "width": 128, "heads": 2, "layers": 2}, 64, 64,
    ),
    "vit-b-32": Shape({"image_size": 224, "patch_size": 32, "width": 768, "layers": 12}, TEXT, 512, 8),
    "vit-b-32, short texts": Shape({"image_size": 224, "patch_size": 32, "width": 768, "layers": 12}, TEXT, 512, 8, 20),
}  # fmt: skip


def recipe_of(shape: Shape, steps: int, packs: int) -> Recipe:
    def tower(values: dict[str, int], heads: int) -> dict[str, Any]:
        width = values["width"]
        return {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": values["layers"], "num_attention_heads": heads,
            "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        }  # fmt: skip

    text, last = shape.text, shape.text["vocab_size"] - 1
    return Recipe.model_validate({
        "name": "bench", "tokenizer": {"path": "none"}, "data": {"sources": {"pairs": {"uri": "nowhere"}}},
        "model": {"architecture": "clip", "config": {
            "projection_dim": shape.joint,
            "vision_config": {
                **tower(shape.vision, shape.vision["width"] // 64), "image_size": shape.vision["image_size"],
                "patch_size": shape.vision["patch_size"],
            },
            "text_config": {
                **tower(text, text["heads"]), "max_position_embeddings": text["context_length"], "vocab_size": text["vocab_size"],
                "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last,
            },
        }},
        "stages": [{
            "name": "bench", "objective": "clip", "train": {part: {"lr": RATE} for part in ("vision", "projector", "language")},
            "mixture": {"weights": {"pairs": 1.0}}, "sequence_length": text["context_length"], "budget": {"steps": steps},
            "batch": {"packs": packs, "samples_per_pack": shape.pairs}, "precision": "fp32", "data_loading": {"engine": "inline"},
            "schedule": {"kind": "constant", "warmup": 0},
            "optimizer": {"betas": BETAS, "eps": EPSILON, "weight_decay": DECAY, "clip": CLIP},
        }],
    })  # fmt: skip


def pack_of(config: Any, shape: Shape, number: int) -> PackedExample:
    """Pairs that depend on the pack's number alone."""
    rng, family = np.random.default_rng([7, number]), family_model(config).family
    length, last = shape.text["context_length"], shape.text["vocab_size"] - 1
    lengths = np.full(shape.pairs, length)
    if shape.mean_text:
        lengths = np.clip(shape.mean_text * np.exp(rng.normal(0.0, 0.4, shape.pairs)), 4, length).astype(int)
    texts = [np.concatenate([[last - 1], rng.integers(0, last - 1, int(count) - 2), [last]]) for count in lengths]
    views = [family.view(640, 480, (1, 10**7)) for _ in texts]
    return PackedExample(
        pack=number, input_ids=np.concatenate(texts).astype(np.int32), targets=np.full(int(lengths.sum()), -100, np.int32),
        position_ids=np.concatenate([np.arange(count) for count in lengths])[None].astype(np.int32),
        segment_ends=np.cumsum(lengths).astype(np.int32),
        pixels=rng.integers(0, 256, (sum(view.rows for view in views), family.row_values), dtype=np.uint8),
        image_facts=np.asarray([view.facts for view in views], np.int32), image_tokens=np.zeros(shape.pairs, np.int32),
        image_rows=np.asarray([view.rows for view in views], np.int32), sample_ids=[f"{number}-{place}" for place in range(shape.pairs)],
        sources=["pairs"] * shape.pairs, kinds=["caption"] * shape.pairs, sequence_length=length,
        epochs=np.zeros(shape.pairs, np.int32),
    )  # fmt: skip


# ---------------------------------------------------------------- open_clip


def import_open_clip(folder: str) -> Any:
    """Its package; the operators that torchvision's CUDA wheel misses on a CPU are named, nobody calls them."""
    sys.path.append(folder)
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor x) -> Tensor")
    library.define("qnms(Tensor x) -> Tensor")
    import open_clip

    return open_clip


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of transformers' CLIPModel under open_clip's names."""
    found: dict[str, torch.Tensor] = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    norms["ln_final"] = "text_model.final_layer_norm"
    inner = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"
    }  # fmt: skip
    for theirs, ours in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        layers = {int(name.split(".")[3]) for name in state if name.startswith(f"{ours}.encoder.layers.")}
        for layer in layers:
            block, source = f"{theirs}.resblocks.{layer}", f"{ours}.encoder.layers.{layer}"
            norms |= {f"{block}.{new}": f"{source}.{old}" for new, old in inner.items()}
            for kind in ("weight", "bias"):
                parts = [state[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    for new, old in norms.items():
        found |= {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


class OneBatch:
    """What train_one_epoch asks of its data."""

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.dataloader = self
        self.batches, self.num_batches, self.num_samples = batches, len(batches), sum(len(texts) for _, texts in batches)

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.batches)


class OpenClip:
    """Its model with the stage's first weights, its loss, its optimizer as its `main` makes it, and its epoch."""

    def __init__(self, package: Any, recipe: Recipe, shape: Shape) -> None:
        from open_clip.loss import ClipLoss
        from open_clip_train.train import train_one_epoch

        config = model_config(recipe.model)
        self.model = package.CLIP(embed_dim=shape.joint, vision_cfg=shape.vision, text_cfg=shape.text, output_dict=True)
        own = build_model(recipe.model, config).state_dict()
        told = self.model.load_state_dict(renamed(own), strict=False)
        assert not told.unexpected_keys, told
        assert set(told.missing_keys) <= {"attn_mask"}, told
        self._family, self._shape, self._epoch, self._loss = family_model(config), shape, train_one_epoch, ClipLoss()
        named = list(self.model.named_parameters())

        def plain(name: str, parameter: torch.nn.Parameter) -> bool:
            return parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for name, p in named if plain(name, p)], "weight_decay": 0.0},
                {"params": [p for name, p in named if not plain(name, p)], "weight_decay": DECAY},
            ],
            lr=RATE, betas=BETAS, eps=EPSILON,
        )  # fmt: skip
        self.losses: list[float] = []

    def batch(self, pack: PackedExample) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = self._family.normalised(torch.from_numpy(pack.pixels), torch.float32)
        side, length = self._shape.vision["image_size"], self._shape.text["context_length"]
        ids = torch.zeros(len(pack.sample_ids), length, dtype=torch.int64)
        for row, text in zip(ids, np.split(pack.input_ids, pack.segment_ends[:-1])):
            row[: len(text)] = torch.from_numpy(text.astype(np.int64))
        return pixels.view(-1, 3, side, side), ids

    def step(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        told = Losses()
        args = Namespace(
            device="cpu", precision="fp32", distill=False, accum_freq=len(batches), skip_scheduler=True, horovod=False,
            grad_clip_norm=CLIP, rank=0, local_rank=0, log_local=False, log_every_n_steps=1, world_size=1, batch_size=len(batches[0][1]),
            wandb=False,
        )  # fmt: skip
        self._epoch(self.model, {"train": OneBatch(batches)}, self._loss, 0, self._optimizer, None, None, None, args, told)
        self.losses.append(told.loss)


class Losses:
    """A writer of TensorBoard that keeps the loss."""

    loss = float("nan")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "train/loss":
            self.loss = value


# ---------------------------------------------------------------- both


def measure(name: str, folder: str | None, steps: int, packs: int) -> dict[str, Any]:
    """Median seconds of both, the median of the ratios of neighbouring steps, and how far the losses are apart."""
    logging.getLogger().setLevel(logging.WARNING)
    shape, total = SHAPES[name], steps + WARM_STEPS + 1  # the last step writes a checkpoint and is left out
    recipe = recipe_of(shape, total, packs)
    config = model_config(recipe.model)
    other = OpenClip(import_open_clip(folder), recipe, shape) if folder else None
    theirs, ours = [], []

    def stream(start: int) -> Iterator[StepExamples]:
        for step in range(start, total):
            taken = [pack_of(config, shape, step * packs + place) for place in range(packs)]
            if other is not None:
                batches = [other.batch(pack) for pack in taken]
                begun = time.perf_counter()
                other.step(batches)
                theirs.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            yield StepExamples(step, taken)
            ours.append(time.perf_counter() - begun)  # everything that the loop does until it asks for the next step

    feed = StageFeed(config, total, stream, lambda step: {"pack": step}, lambda state: None)
    with tempfile.TemporaryDirectory() as place:
        train_stage(recipe, 0, feed, Path(place), None, WorkerContext(), Clip)
        lines = [json.loads(line) for line in (Path(place) / "metrics.jsonl").read_text().splitlines()]
    mine = np.asarray(ours)[WARM_STEPS:]  # the stream ends before the last step's time is taken
    found: dict[str, Any] = {"terrace_seconds": float(np.median(mine)), "steps": len(mine), "losses": [line["loss"] for line in lines]}
    if other is not None:
        pairs = np.asarray(theirs)[WARM_STEPS : WARM_STEPS + len(mine)]
        found |= {
            "open_clip_seconds": float(np.median(pairs)), "ratio": float(np.median(mine / pairs)),
            "loss_difference": max(abs(a - b) / b for a, b in zip(found["losses"], other.losses)), "open_clip_losses": other.losses,
        }  # fmt: skip
    return found
