"""Tiny models of two towers, and pairs made in memory: what the data path would give, without data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from ranks import Step, train

from terrace.data.types import PackedExample
from terrace.models.build import build_model, model_config
from terrace.models.families.registry import family_model
from terrace.objectives.interface import StageFeed
from terrace.recipe.schema import Model, Recipe
from terrace.worker.context import WorkerContext

VOCABULARY = 400
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
WIDE = {"initializer_range": 0.3}  # so that what a token sees shows in the vectors
ARCHITECTURES = {"clip_and_roberta": "vision_text_dual_encoder"}  # of towers under another name
PADDING = {"vision_text_dual_encoder": 0, "clip_and_roberta": 0}  # where it is not the mark of the end
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
    "siglip": {"text_config": TEXT, "vision_config": VISION},
    "siglip2": {"text_config": TEXT, "vision_config": {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_patches": 16}},
    "vision_text_dual_encoder": {"text_config": TEXT | WIDE, "vision_config": VISION, "projection_dim": 16},
    "clip_and_roberta": {
        "text_config": TEXT | WIDE | {"model_type": "roberta", "max_position_embeddings": 17},
        "vision_config": VISION | {"model_type": "clip_vision_model"}, "projection_dim": 16,
    },
    "blip_2_matching": {
        "vision_config": VISION, "qformer_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
            "encoder_hidden_size": 32, "use_qformer_text_input": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        "text_config": {"model_type": "opt"}, "num_query_tokens": 4, "image_text_hidden_size": 16, "image_token_index": 399,
    },
}
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}


def section_of(name: str, **changes: Any) -> dict[str, Any]:
    """`model:` of a recipe whose vocabulary is known."""
    config = TOWERS[name]
    ids = IDS | {"pad_token_id": PADDING.get(name, 1)}
    return {"architecture": ARCHITECTURES.get(name, name), "config": {**config, "text_config": {**config["text_config"], **ids}, **changes}}


def towers_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    section = Model.model_validate(section_of(name))
    config = model_config(section)
    return build_model(section, config).to(dtype), config


def pair_pack(config: Any, number: int, pairs: int, first: int | None = None) -> PackedExample:
    """Pairs `first` to `first + pairs` of an endless list (default: those that packs of this size have)."""
    family = family_model(config).family
    first = number * pairs if first is None else first
    texts, pixels, facts, rows = [], [], [], []
    for place in range(first, first + pairs):
        rng = np.random.default_rng([7, place])
        texts.append(np.append(rng.integers(2, VOCABULARY, int(rng.integers(3, 12))), 1))
        view = family.view(int(rng.integers(20, 90)), int(rng.integers(20, 90)), (1, 3_136))
        pixels.append(rng.integers(0, 256, (view.rows, family.row_values), dtype=np.uint8))
        facts.append(view.facts)
        rows.append(view.rows)
    return PackedExample(
        pack=number, input_ids=np.concatenate(texts).astype(np.int32), targets=np.full(sum(map(len, texts)), -100, np.int32),
        position_ids=np.concatenate([np.arange(len(text)) for text in texts])[None].astype(np.int32),
        segment_ends=np.cumsum([len(text) for text in texts]).astype(np.int32), pixels=np.concatenate(pixels),
        image_facts=np.asarray(facts, np.int32), image_tokens=np.zeros(pairs, np.int32), image_rows=np.asarray(rows, np.int32),
        sample_ids=[f"p{place}" for place in range(first, first + pairs)], sources=["pairs"] * pairs, kinds=["caption"] * pairs,
        sequence_length=16, epochs=np.zeros(pairs, np.int32),
    )  # fmt: skip


def towers_recipe(name: str, objective: str, **stage: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "name": "one", "objective": objective, "train": {part: {"lr": 1e-3} for part in ("vision", "projector", "language")},
        "mixture": {"weights": {"pairs": 1.0}}, "sequence_length": 16, "budget": {"steps": 4}, "precision": "fp32",
        "batch": {"packs": 4, "samples_per_pack": 3}, "schedule": {"kind": "constant", "warmup": 0},
        "data_loading": {"engine": "inline"}, "pixels": {"min": 1, "max": 3_136},
    }  # fmt: skip
    return Recipe.model_validate({
        "name": "towers", "model": section_of(name), "tokenizer": {"train_vocabulary_size": VOCABULARY},
        "data": {"sources": {"pairs": {"uri": "nowhere"}}}, "stages": [{**defaults, **stage}],
    })  # fmt: skip


def towers_feed(recipe: Recipe, context: WorkerContext, pairs_of: Sequence[int] | None = None) -> StageFeed:
    """Steps of consecutive pairs. `pairs_of` says how many each pack of a step holds, where they are not equally many."""
    stage, config = recipe.stages[0], model_config(recipe.model)
    sizes = list(pairs_of or [stage.batch.samples_per_pack] * stage.batch.packs)
    share = stage.batch.packs // context.world_size

    def stream(start: int) -> Iterator[Step]:
        for step in range(start, int(stage.budget.steps or 0)):
            firsts = step * sum(sizes) + np.concatenate([[0], np.cumsum(sizes)[:-1]])
            packs = [
                pair_pack(config, step * len(sizes) + place, size, int(first)) if size else empty(place)
                for place, (size, first) in enumerate(zip(sizes, firsts))
            ]
            yield Step(step, packs[context.rank * share : (context.rank + 1) * share])

    held_out = {"caption": [pair_pack(config, 900 + place, 4) for place in range(3)]}
    return StageFeed(
        config, int(stage.budget.steps or 0), stream, lambda step: {"pack": step * len(sizes)}, lambda state: None, held_out=held_out
    )


def empty(place: int) -> PackedExample:
    from terrace.objectives.lm import empty_pack

    return empty_pack(1_000_000 + place)


def train_towers(
    rank: int, world_size: int, recipes: dict[str, dict[str, Any]], out: str, pairs_of: Sequence[int] | None = None,
    stop_after: int | None = None,
) -> None:
    """Each recipe in a folder of its name, in the same processes."""
    for name, values in recipes.items():
        recipe = Recipe.model_validate(values)
        asked = 0

        def should_stop() -> str | None:
            nonlocal asked
            asked += 1
            return "test" if stop_after is not None and asked >= stop_after else None

        context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank, should_stop=should_stop)
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        train(recipe, 0, towers_feed(recipe, context, pairs_of), folder, None, context)


class Plain:
    """A strategy of one process without an optimizer, in any precision: what the arithmetic of a step is measured with."""

    def __init__(self, model: Any, world_size: int) -> None:
        self.model, self.loss_scale, self._ranks = model, None, world_size

    def loss(self, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.objective.loss(self.model, batch)

    def tensors(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.model.named_parameters())

    def accumulate(self, batch: Any, scale: float, last: bool) -> torch.Tensor:
        loss = self.objective.loss(self.model, batch)
        (loss * scale).backward()
        return loss.detach()


def gradients_of_step(
    rank: int, world_size: int, name: str, objective: str, sizes: Sequence[int], dtype: str = "float64", **options: Any
) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of step 0 of `sum(sizes)` pairs in packs of these sizes, and all gradients summed over the ranks."""
    import importlib

    import torch.distributed as dist

    from terrace.objectives.interface import Opening, StageRun

    recipe = towers_recipe(name, objective, batch={"packs": len(sizes), "samples_per_pack": max(sizes)}, **options)
    context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
    model, _ = towers_model(name, getattr(torch, dtype))
    opening = Opening(recipe, recipe.stages[0], towers_feed(recipe, context, sizes), context, Path())
    learner = importlib.import_module(f"terrace.objectives.{objective}").open_objective(opening)
    if dtype == "float64":
        real = learner._batch

        def wide(example: Any, *more: Any) -> Any:
            batch = real(example, *more)
            batch.dtype = torch.float64
            return batch

        learner._batch = wide
    strategy = Plain(model, world_size)
    strategy.objective = learner
    learner.begin(StageRun(strategy, lambda *_: None, lambda *_: None))
    [taken, *_] = learner.steps(0)
    total = float(opening.gather([sum(learner.weight(example) for example in taken.examples)]).sum())
    learner.before(taken.examples, 1.0 / total)
    loss = torch.zeros((), dtype=torch.float64)
    for example in taken.examples:
        loss += strategy.accumulate(learner.batch(example), 1.0 / total, True).double()
    found = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
    if world_size > 1:
        dist.all_reduce(loss)
        for gradient in found.values():
            dist.all_reduce(gradient)
    return float(loss) / total, {key: gradient.numpy() for key, gradient in found.items()}


def gradients_of_steps(rank: int, world_size: int, cases: Sequence[tuple[Any, ...]]) -> list[tuple[float, dict[str, np.ndarray]]]:
    """`gradients_of_step` of several cases in the same processes."""
    return [gradients_of_step(rank, world_size, *case) for case in cases]


def assert_equal(found: tuple[float, dict[str, np.ndarray]], expected: tuple[float, dict[str, np.ndarray]], tolerance: float) -> None:
    """Losses within a share of themselves, gradients within the same share of the largest."""
    (loss, gradients), (wanted, reference) = found, expected
    assert abs(loss - wanted) <= tolerance * abs(wanted), (loss, wanted)
    largest = max(float(np.abs(gradient).max()) for gradient in reference.values())
    worst = max((float(np.abs(gradients[key] - reference[key]).max()), key) for key in reference)
    assert worst[0] < tolerance * largest, worst


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


def write_rows(folder: Path, count: int = 40) -> None:
    """Captions of one picture each, and some of two."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % 4]
        size = (int(rng.integers(30, 70)), int(rng.integers(30, 70)))
        pixels = np.full((size[1], size[0], 3), colour, np.uint8)
        pixels[: number + 1, 0] = 0  # no two pictures are the same
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"A picture in {name}, number {number}" + " and more" * (number % 7)})
    for number in range(9):
        for side in "ab":
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{side}{number}.png")
        rows.append({"images": [f"a{number}.png", f"b{number}.png"], "caption": f"Two pictures side by side, number {number}"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
