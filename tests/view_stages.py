"""Tiny stages of the objectives over views, on pictures made in memory: what the data path would give, without data."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import Step, train

from terrace.data.types import PackedExample
from terrace.models.build import materialise, meta_model, model_config
from terrace.models.heads import source_with_heads
from terrace.models.view_heads import attach_view_heads, tower_width
from terrace.models.weights import initial_weights
from terrace.objectives.interface import Opening, StageFeed, StageRun
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

SIDE = 16
CONFIG = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4,
}  # fmt: skip
HEAD = {"hidden_width": 12, "output_width": 8}
GLOBALS = [{"area": [0.4, 1.0], "blur": 1.0}, {"area": [0.4, 1.0], "solarise": 0.5}]
CASES: dict[str, dict[str, Any]] = {
    "simclr": {"simclr": HEAD},
    "moco-v2": {"moco": {**HEAD, "queue": 20, "layers": 2, "norm": "none", "momentum": 0.9}},
    "moco-v3": {"moco": {**HEAD, "momentum": 0.9}},
    "byol": {"byol": {**HEAD, "momentum": 0.9}},
    "simsiam": {"simsiam": {**HEAD, "predictor_width": 6}},
    "simsiam-layer": {"simsiam": {**HEAD, "predictor_width": 6, "norm": "layer"}},
    "dino": {
        "dino": {**HEAD, "prototypes": 10, "momentum": 0.9, "frozen_prototypes": 0.3},
        "views": [*GLOBALS, {"count": 2, "side": 8, "area": [0.1, 0.4]}],
    },
    "swav": {
        "swav": {**HEAD, "prototypes": 6, "queue": 8, "queue_from": 0.0, "frozen_prototypes": 0.0},
        "views": [*GLOBALS, {"count": 1, "side": 8, "area": [0.1, 0.4]}],
    },
    "instance_discrimination": {"instance_discrimination": {"output_width": 8}},
    "cpc": {"cpc": {"output_width": 8, "context_width": 10, "grid": 3, "ahead": 2}},
}  # fmt: skip

DEPTH = {"train": {"vision": {"lr": 1e-2, "drop_path": 0.6}, "heads": {"lr": 1e-2}}}
PATHS = {f"{case}-paths": {**CASES[case], **DEPTH} for case in ("simclr", "dino")}  # whose pictures go past some branches


def views_recipe(case: str, **stage: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "name": "one", "objective": case.split("-")[0], "train": {"vision": {"lr": 1e-2}, "heads": {"lr": 1e-2}},
        "mixture": {"weights": {"pictures": 1.0}}, "sequence_length": 16, "budget": {"steps": 4}, "precision": "fp32",
        "batch": {"packs": 4, "samples_per_pack": 3}, "schedule": {"kind": "constant", "warmup": 0},
        "data_loading": {"engine": "inline"}, **(CASES | PATHS)[case],
    }  # fmt: skip
    return Recipe.model_validate({
        "name": "views", "model": {"architecture": "vit", "config": CONFIG}, "tokenizer": {"train_vocabulary_size": 330},
        "data": {"sources": {"pictures": {"uri": "nowhere", "kind": "picture"}}}, "stages": [{**defaults, **stage}],
    })  # fmt: skip


def picture_pack(number: int, first: int, pictures: int, of: int = 1_000) -> PackedExample:
    """Pictures `first` to `first + pictures` of an endless walk through a list of `of`."""
    from terrace.objectives.lm import empty_pack

    if not pictures:
        return empty_pack(number)
    places = range(first, first + pictures)
    pixels = [np.random.default_rng([7, place % of]).integers(0, 256, 3 * SIDE * SIDE, dtype=np.uint8) for place in places]
    ends = np.arange(1, pictures + 1, dtype=np.int32)
    return PackedExample(
        pack=number, input_ids=np.zeros(pictures, np.int32), targets=np.full(pictures, -100, np.int32),
        position_ids=np.zeros((1, pictures), np.int32), segment_ends=ends, pixels=np.stack(pixels),
        image_facts=np.ones((pictures, 1), np.int32), image_tokens=np.zeros(pictures, np.int32), image_rows=np.ones(pictures, np.int32),
        sample_ids=[f"p{place % of}" for place in places], sources=["pictures"] * pictures, kinds=["picture"] * pictures,
        sequence_length=16, epochs=np.asarray([place // of for place in places], np.int32),
    )  # fmt: skip


def views_feed(recipe: Recipe, context: WorkerContext, pictures_of: Sequence[int] | None = None) -> StageFeed:
    """Steps of consecutive pictures, 18 in all. `pictures_of` says how many each pack of a step holds."""
    stage = recipe.stages[0]
    sizes = list(pictures_of or [stage.batch.samples_per_pack] * stage.batch.packs)
    share = len(sizes) // context.world_size

    def stream(start: int) -> Iterator[Step]:
        for step in range(start, int(stage.budget.steps or 0)):
            firsts = step * sum(sizes) + np.concatenate([[0], np.cumsum(sizes)[:-1]])
            packs = [picture_pack(step * len(sizes) + place, int(firsts[place]), size, 18) for place, size in enumerate(sizes)]
            yield Step(step, packs[context.rank * share : (context.rank + 1) * share])

    held_out = [picture_pack(place, 100 + 4 * place, 4) for place in range(3)]
    for pack in held_out:
        pack.epochs = np.zeros(0, np.int32)
    return StageFeed(
        model_config(recipe.model), int(stage.budget.steps or 0), stream, lambda step: {"pack": step * len(sizes)}, lambda state: None,
        held_out={"picture": held_out},
    )  # fmt: skip


def train_views(
    rank: int, world_size: int, recipes: dict[str, dict[str, Any]], out: str, pictures_of: Sequence[int] | None = None,
    stop_after: int | None = None,
) -> None:
    """Each recipe in a folder of its name, in the same processes."""
    for name, values in recipes.items():
        recipe = Recipe.model_validate(values)
        asked = iter(range(1, 1_000))

        def should_stop(asked: Iterator[int] = asked) -> str | None:
            return "test" if stop_after is not None and next(asked) >= stop_after else None

        context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank, should_stop=should_stop)
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        train(recipe, 0, views_feed(recipe, context, pictures_of), folder, None, context)


class Plain:
    """A strategy of one process without an optimizer, in any precision."""

    def __init__(self, model: Any) -> None:
        self.model, self.loss_scale, self.objective = model, None, None

    def loss(self, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.objective.loss(self.model, batch)

    def accumulate(self, batch: Any, scale: float) -> torch.Tensor:
        loss = self.objective.loss(self.model, batch)
        (loss * scale).backward()
        return loss.detach()

    def tensors(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.model.named_parameters())


def learner_of(
    case: str, sizes: Sequence[int], rank: int = 0, world_size: int = 1, dtype: torch.dtype = torch.float64, **options: Any
) -> Any:
    """The objective of a case with a model of random weights; its teacher is another one, as it is after some steps."""
    recipe = views_recipe(case, batch={"packs": len(sizes), "samples_per_pack": max(sizes)}, **options)
    context, stage = WorkerContext(rank=rank, world_size=world_size, local_rank=rank), recipe.stages[0]
    config = model_config(recipe.model)
    skeleton = meta_model(config)
    source, _ = initial_weights(recipe.model, skeleton, None, None)
    attach_view_heads(skeleton, stage.objective, stage.view_options, tower_width(config))
    model = materialise(skeleton, source_with_heads(skeleton, source, None, 0), "cpu").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that pictures differ, and rounding is not all that a norm makes large
            if parameter.dim() > 1 and not name.startswith("heads."):
                parameter.mul_(8.0)
    learner = importlib.import_module(f"terrace.objectives.{stage.objective}").open_objective(
        Opening(recipe, stage, views_feed(recipe, context, sizes), context, Path())
    )
    learner.dtype = dtype
    strategy = Plain(model)
    strategy.objective = learner
    learner.begin(StageRun(strategy, lambda *_: None, lambda *_: None))
    if learner.teacher is not None:
        learner.teacher.model.to(dtype)
        noise = torch.Generator().manual_seed(3)
        for tensor in learner.teacher.tensors.values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=noise, dtype=torch.float64).to(tensor))
    return learner


def gradients_of_step(
    rank: int, world_size: int, case: str, sizes: Sequence[int], dtype: str = "float64"
) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of step 0 of `sum(sizes)` pictures in packs of these sizes, all gradients summed over ranks, and the state after it."""
    import torch.distributed as dist

    learner = learner_of(case, sizes, rank, world_size, getattr(torch, dtype))
    strategy, opening = learner.strategy, learner.opening
    [taken, *_] = learner.steps(0)
    learner.step = 0
    total = float(opening.gather([sum(learner.weight(example) for example in taken.examples)]).sum())
    learner.before(taken.examples, 1.0 / total)
    loss = torch.zeros((), dtype=torch.float64)
    for example in taken.examples:
        loss += strategy.accumulate(learner.batch(example), 1.0 / total).double()
    found = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in strategy.model.named_parameters()}
    if world_size > 1:
        dist.all_reduce(loss)
        for gradient in found.values():
            dist.all_reduce(gradient)
    spread = learner.values(True)["spread"]
    learner.after_step(1)
    state = {f"state {name}": tensor.double().numpy() for name, tensor in learner.state()}
    return float(loss) / total, {key: gradient.numpy() for key, gradient in found.items()} | state | {"spread": np.asarray(spread)}


def gradients_of_steps(rank: int, world_size: int, cases: Sequence[tuple[Any, ...]]) -> list[tuple[float, dict[str, np.ndarray]]]:
    """`gradients_of_step` of several cases in the same processes."""
    return [gradients_of_step(rank, world_size, *case) for case in cases]
