"""Functions that test processes run: steps of a family over packs cut in several ways; experts are balanced with much weight."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from families import CONFIGS, PIXELS, Case, case_of, conversation, pack_of
from packs import tiny_recipe

from terrace.families.registry import family_class
from terrace.models.build import model_config
from terrace.objectives.interface import StageFeed, StepExamples
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Model
from terrace.train.loop import train_stage
from terrace.worker.context import WorkerContext

SAMPLES = [conversation(1, [(70, 60)]), conversation(2, []), conversation(3, [(60, 120)]), conversation(4, []), conversation(5, [])]


def moe_case(name: str, folder: Path) -> Case:
    """The tiny family with experts in both layers."""
    config = copy.deepcopy(CONFIGS[name])
    if name == "terrace_vlm":  # as a stage upcycles it
        config = family_class(name).upcycled(config, {"count": 4, "per_token": 2, "capacity_factor": None, "layers": "all"})
    dense = {"mlp_only_layers": [], "first_k_dense_replace": 0}  # the fields that say which layers are
    config["text_config"] |= {field: value for field, value in dense.items() if field in config["text_config"]}
    small = case_of(name, folder)
    section = Model.model_validate({"architecture": name, "config": config})
    return Case(name, section, small.family, small.tokenizer, model_config(section, small.tokenizer), PIXELS.get(name, (784, 12_544)))


def train_experts(
    rank: int, world_size: int, name: str, runs: Sequence[tuple[str, Sequence[Sequence[int]], dict[str, Any]]], folder: str
) -> list[list[dict[str, Any]]]:
    """The lines of two steps for each of `runs`: strategy, which of SAMPLES are in which pack, further fields of the stage."""
    case = moe_case(name, Path(folder) / f"tokenizers-{world_size}-{rank}")
    found = []
    for number, (strategy, packs, stage) in enumerate(runs):
        made = [pack_of(case, [SAMPLES[place] for place in places], at) for at, places in enumerate(packs)]
        ring = stage.get("parallel", {}).get("sequence_parallel", 1)  # ranks of a group take the same packs
        share, group = -(-len(made) // (world_size // ring)), rank // ring

        def stream(start: int, own: list[Any] = made[group * share : (group + 1) * share]):
            return iter([StepExamples(step, own) for step in range(start, 2)])

        recipe = tiny_recipe(
            model=case.section.model_dump(exclude_none=True), budget={"steps": 2}, batch={"packs": len(packs)}, sequence_length=512,
            **{"expert_balance": 3.0 if case.family.experts else None, "parallel": {"strategy": strategy}, **stage},
        )  # fmt: skip
        held_out = {"qa": made[:1]}
        feed = StageFeed(case.config, 2, stream, lambda step: {"step": step}, lambda state: None, held_out=held_out)
        target = Path(folder) / f"{number}-{world_size}"
        target.mkdir(parents=True, exist_ok=True)
        lines: list[dict[str, Any]] = []

        def observe(event: str, values: dict[str, Any], lines: list[dict[str, Any]] = lines) -> None:
            if event in ("step", "evaluation"):
                lines.append(values)

        context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
        objective = importlib.import_module(OBJECTIVES[recipe.stages[0].objective].module).open_objective
        train_stage(recipe, 0, feed, target, None, context, objective, (observe,))
        found.append(lines)
    return found
