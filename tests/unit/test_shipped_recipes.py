"""Every recipe that Terrace ships: planned within its time, with the parameters that transformers builds and its source states."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
from families import NAMES as FAMILIES
from recipe_table import PUBLISHED, filled, table

from terrace.models.build import meta_model, model_config
from terrace.models.families.registry import family_of_model
from terrace.models.parts import part_parameters
from terrace.planner.adapters import with_adapters
from terrace.planner.parameters import head_parameters, parameter_counts, trainable_counts
from terrace.planner.plan import make_plan
from terrace.planner.render import plan_values
from terrace.planner.shapes import model_shape
from terrace.recipe.changes import stage_recipe
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import PARTS, Model, Stage
from terrace.recipe.shipped import names

ROOT = Path(__file__).resolve().parents[2]
PLAN_SECONDS = 20
NAMES = names()
COUNTED = ("mimo-vl-7b", "llava-1.5-7b", "qwen-vl-7b", "kimi-vl-a3b")  # in `make test`; building the others is slow together


@cache
def built(section: str) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Parameters per part of the class itself, on the meta device; and those that never train."""
    model = meta_model(model_config(Model.model_validate_json(section)))
    family = family_of_model(model)
    parts = part_parameters(model)
    unused = set(family.unused(model.config, [name for pairs in parts.values() for name, _ in pairs]))
    count = {part: sum(p.numel() for _, p in parts[part]) for part in PARTS}
    return count, {part: sum(p.numel() for name, p in parts[part] if name in unused) for part in PARTS}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_planned_in_time(name: str) -> None:
    started = time.process_time()
    recipe = load_recipe(name)
    if recipe.model.pretrained is not None:
        return  # a template over a checkpoint of the reader's own
    values = plan_values(make_plan(recipe))
    assert time.process_time() - started < PLAN_SECONDS
    assert [stage["name"] for stage in values["stages"]] == [stage.name for stage in recipe.stages]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in COUNTED else pytest.mark.slow) for name in PUBLISHED])
def test_the_plan_counts_the_parameters_of_the_class_in_every_stage(name: str) -> None:
    recipe = load_recipe(name)
    for index, stage in enumerate(recipe.stages):
        seen = stage_recipe(recipe, index)
        shape = with_adapters(model_shape(seen), stage, seen.model.model_copy(update={"init": None}))
        counted, unused = built(seen.model.model_copy(update={"init": None, "stands_in_for": None}).model_dump_json())
        assert parameter_counts(shape) == counted
        planned = trainable_counts(shape, stage)
        for part in PARTS:
            training = getattr(stage.train, part)
            if training is None or not training.lora:  # adapters are counted in test_lora.py
                some = bool(training and training.only)  # counted in test_some_tensors.py
                assert 0 < planned[part] < counted[part] if some else planned[part] == (counted[part] - unused[part] if training else 0)


# Independent counts, as the sources state them: (recipe, parts, figure, share that the statement leaves open).
STATED = [
    ("mimo-vl-7b", PARTS, 8_306_217_216, 0),  # computed with transformers' class from the paper's table
    ("qwen2.5-vl-7b", PARTS, 8_292_166_656, 0),  # the released model
    ("qwen2-vl-7b", ("vision", "projector"), 675.5e6, 0.5 / 675),  # "675M": 675.0 to 676.0
    ("qwen-vl-7b", ("projector",), 0.08e9, 0.005 / 0.08),  # two figures at most; the tower's "1.9B" is not what its class has
    ("qwen-vl-7b", ("language",), 7.7e9, 0.05 / 7.7),
    ("qwen-vl-7b", PARTS, 9.6e9, 0.06 / 9.6),
    ("kimi-vl-a3b", ("language",), 16e9, 0.5 / 16),  # "16B", with 2.8B active
    ("kimi-vl-a3b", ("vision",), 400e6, 50 / 400),  # "400M"
]


@pytest.mark.parametrize(("name", "parts", "stated", "open_share"), STATED)
def test_parameters_are_those_that_the_source_states(name: str, parts: tuple[str, ...], stated: float, open_share: float) -> None:
    counts = parameter_counts(model_shape(load_recipe(name)))
    assert sum(counts[part] for part in parts) == pytest.approx(stated, rel=max(open_share, 1e-3 if open_share else 0), abs=0)


def test_the_visual_experts_of_cogvlm_have_the_stated_parameters() -> None:
    """"6.5B trainable" are its experts, to two figures: the connector of its code has 142.6M beside them."""
    recipe = load_recipe("cogvlm-17b")
    connector = 1792 * 4096 + 2 * 4096 + 3 * 4096 * 11008
    experts = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert parameter_counts(model_shape(recipe))["projector"] == experts + connector
    assert experts == pytest.approx(6.5e9, rel=0.05 / 6.5)


def test_a_further_block_of_mimo_has_the_published_parameters() -> None:
    """The one layer of MiMo-7B for the token after the next, with its projection and norms."""
    recipe = load_recipe("mimo-vl-7b")
    stage = recipe.stages[-1].model_dump() | {"objective": "mtp", "train": {"heads": {"lr": 1e-3}}}
    assert head_parameters(model_shape(recipe), Stage.model_validate(stage)) == 210_790_400


# What a stage trains where that is less than its parts: (recipe, stage, figure, share that the statement leaves open).
TRAINED = [
    ("lavin-7b", 0, 3.8e6, 0.05 / 3.8),  # "3.8M"
    ("lavin-13b", 0, 5.4e6, 0.05 / 5.4),  # "5.4M"
    # Four windows in 48 blocks: query, key and value from 16 numbers; the output from 16; beside the feed-forward from 32; three factors.
    # With the resampler and the language model, all of which train.
    ("monkey-9b", 0, 48 * 4 * (16 * (1664 + 3 * 1664) + 16 * 2 * 1664 + 32 * 2 * 1664 + 3) + 75_005_952 + 7_721_324_544, 0),
    # Projections between queries, patches and tokens, and the MLP; from 768 and 1408 numbers to 4096.
    ("llama-vid-7b", 0, 769 * 1408 + 1409 * 1408 + 2 * 1409 * 4096 + 4097 * 4096, 0),
]


@pytest.mark.parametrize(("name", "index", "stated", "open_share"), TRAINED)
def test_a_stage_trains_as_many_parameters_as_its_source_states(name: str, index: int, stated: float, open_share: float) -> None:
    seen = stage_recipe(load_recipe(name), index)
    stage = seen.stages[index]
    shape = with_adapters(model_shape(seen), stage, seen.model.model_copy(update={"init": None}))
    assert sum(trainable_counts(shape, stage).values()) == pytest.approx(stated, rel=open_share, abs=0)


def test_the_plan_of_llava_13b_is_near_the_hours_that_it_took() -> None:
    """5.5 and 20 hours on eight A100 as published; the plan assumes a share of the peak, so half to one and a half is near."""
    hours = [stage["hours"] for stage in plan_values(make_plan(load_recipe("llava-1.5-13b")))["stages"]]
    assert [0.5 < planned / took < 1.5 for planned, took in zip(hours, (5.5, 20))] == [True, True]


def test_an_extending_recipe_changes_single_keys_of_the_configuration(tmp_path: Path) -> None:
    """`model.config` is merged like any map; a configuration of another architecture, or a directory, takes its place."""
    base, larger = load_recipe("llava-1.5-7b").model.config, load_recipe("llava-1.5-13b").model.config
    assert base
    assert larger
    assert larger["vision_config"] == base["vision_config"]
    assert larger["text_config"] == base["text_config"] | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40,
    }  # fmt: skip
    other = {"architecture": "qwen2_vl", "config": load_recipe("qwen2-vl-7b").model.config}
    tied = {"tie_word_embeddings": True}
    changes = [(other, other["config"]), ({"pretrained": "/models/x", "init": None}, None), ({"config": tied}, base | tied)]
    for change, config in changes:
        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps({"extends": "llava-1.5-7b", "name": "mine", "model": change}))
        assert load_recipe(path).model.config == config


def test_the_table_of_recipes_is_current() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == filled(page), "run `make docs`"


# Of the field's history, by the first words of a row; LLaVA-1.5 is LLaVA, too.
SYSTEMS = (
    "LaVIN", "LLaMA-VID",
    "BLIP-2", "Chameleon", "CogVLM", "Flamingo", "InstructBLIP", "InternLM-XComposer", "InternVL-1.5", "InternVL-2.5", "Kimi-VL",
    "Llama-3.2-Vision", "LLaVA-1.5", "LLaVA-NeXT", "LLaVA-UHD", "LLaVAR", "MIMIC-IT", "MiMo-VL", "MiniCPM-Llama3-V-2.5", "MiniCPM-V-2.6",
    "MoE-LLaVA", "Monkey", "NExT-GPT", "Otter-", "OtterHD", "Qwen-VL", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "SVIT", "UI-TARS", "Yi-VL",
)  # fmt: skip


def test_the_table_has_every_system_and_every_family_that_writes_text() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table().split("\n")[2:]]
    assert [name for name in SYSTEMS if not any(row[0].startswith(name) for row in rows)] == []
    assert {f"`{name}`" for name in FAMILIES} <= {row[1] for row in rows}
    assert all(len(row) == 8 and all(row) for row in rows)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_says_what_it_is_and_how_sure(name: str) -> None:
    """Its first line names the system and the source, which the table of recipes is made from."""
    text = (ROOT / "jobs" / "recipes" / f"{name}.yaml").read_text()
    first = text.split("\n", 1)[0]
    assert first.startswith("# ")
    assert ": " in first
    assert all(source.uri.startswith("s3://data/") for source in load_recipe(name).data.sources.values())
