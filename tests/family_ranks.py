"""Functions that test processes run: a stage of every family, in which one of two ranks has no picture every second step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adapted import ADAPTED, adapted_case, adapted_config
from families import Case, case_of, conversation, pack_of, recipe_model
from packs import tiny_recipe

from terrace.data.types import PackedExample
from terrace.families.registry import family_class
from terrace.objectives.interface import StageFeed, StepExamples
from terrace.objectives.lm import LanguageModelling
from terrace.recipe.schema import Recipe
from terrace.train.loop import train_stage
from terrace.worker.context import WorkerContext

STEPS = 3


def family_pack(case: Case, number: int, with_images: bool) -> PackedExample:
    sizes = [[(40 + 7 * number, 60)], [], [(50, 90 - 5 * number)]] if with_images else [[], []]
    return pack_of(case, [conversation(10 * number + place, size) for place, size in enumerate(sizes)], number)


def family_recipe(name: str, strategy: str) -> Recipe:
    """Of a family, or of a model with adapters by their name."""
    model = {"architecture": "terrace_vlm", "config": adapted_config(name)} if name in ADAPTED else recipe_model(name)
    parts = {part: {"lr": 1e-3} for part in family_class(model["architecture"]).trainable()}
    return tiny_recipe(
        model=model, train=parts, budget={"steps": STEPS}, batch={"packs": 2}, parallel={"strategy": strategy}
    )


def train_families(rank: int, world_size: int, names: list[str], strategies: list[str], folder: str) -> dict[tuple[str, str], list[float]]:
    """Losses by (family, strategy). Every second step the pack of the second rank is text alone."""
    found = {}
    for name in names:
        tokenizers = Path(folder) / f"tokenizers-{world_size}-{rank}"
        case = adapted_case(name, tokenizers) if name in ADAPTED else case_of(name, tokenizers)

        def stream(start: int, case: Case = case) -> Iterator[StepExamples]:
            for step in range(start, STEPS):
                packs = [family_pack(case, 2 * step, True), family_pack(case, 2 * step + 1, step % 2 == 1)]
                share = len(packs) // world_size
                yield StepExamples(step, packs[rank * share : (rank + 1) * share])

        for strategy in strategies:
            feed = StageFeed(case.config, STEPS, stream, lambda step: {"step": step}, lambda state: None, held_out={})
            target = Path(folder) / f"{name}-{strategy}-{world_size}"
            target.mkdir(parents=True, exist_ok=True)
            losses: list[float] = []

            def observe(event: str, values: dict, losses: list[float] = losses) -> None:
                if event == "step":
                    losses.append(values["loss"])

            context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
            train_stage(family_recipe(name, strategy), 0, feed, target, None, context, LanguageModelling, (observe,))
            found[name, strategy] = losses
    return found
