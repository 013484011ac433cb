"""Every recipe that Terrace ships: planned within its time, with the parameters that transformers builds and its source states."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
from recipe_table import PUBLISHED, filled

from terrace.models.build import meta_model, model_config
from terrace.models.families.registry import family_of_model
from terrace.models.parts import part_parameters
from terrace.planner.parameters import parameter_counts, trainable_counts
from terrace.planner.plan import make_plan
from terrace.planner.render import plan_values
from terrace.planner.shapes import model_shape
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import PARTS, Model
from terrace.recipe.shipped import names

ROOT = Path(__file__).resolve().parents[2]
PLAN_SECONDS = 20
NAMES = names()


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
def test_a_recipe_is_planned_in_time_with_the_parameters_of_its_class(name: str) -> None:
    started = time.process_time()
    recipe = load_recipe(name)
    values = plan_values(make_plan(recipe))
    assert time.process_time() - started < PLAN_SECONDS
    assert [stage["name"] for stage in values["stages"]] == [stage.name for stage in recipe.stages]
    shape = model_shape(recipe)
    if recipe.tokenizer.path is None:
        return  # its vocabulary is trained: the tiny models of the demo are counted elsewhere
    section = recipe.model.model_copy(update={"init": None, "stands_in_for": None})
    counted, unused = built(section.model_dump_json())
    assert parameter_counts(shape) == counted
    for stage in recipe.stages:
        trained = {part: counted[part] - unused[part] if getattr(stage.train, part) else 0 for part in PARTS}
        assert trainable_counts(shape, stage) == trained


# Independent counts, as the sources state them: (recipe, parts, figure, share that the statement leaves open).
STATED = [
    ("mimo-vl-7b", PARTS, 8_306_217_216, 0),  # computed with transformers' class from the paper's table
    ("qwen2.5-vl-7b", PARTS, 8_292_166_656, 0),  # the released model
    ("qwen2-vl-7b", ("vision", "projector"), 675.5e6, 0.5 / 675),  # "675M": 675.0 to 676.0
    ("qwen-vl-7b", ("vision",), 1.9e9, 0.05 / 1.9),  # 1.9B, two figures
    ("qwen-vl-7b", ("projector",), 0.08e9, 0.005 / 0.08),
    ("qwen-vl-7b", ("language",), 7.7e9, 0.05 / 7.7),
    ("qwen-vl-7b", PARTS, 9.6e9, 0.06 / 9.6),
]


@pytest.mark.parametrize(("name", "parts", "stated", "open_share"), STATED)
def test_parameters_are_those_that_the_source_states(name: str, parts: tuple[str, ...], stated: float, open_share: float) -> None:
    counts = parameter_counts(model_shape(load_recipe(name)))
    assert sum(counts[part] for part in parts) == pytest.approx(stated, rel=max(open_share, 1e-3 if open_share else 0), abs=0)


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
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == filled(page), "run `make docs`"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_says_what_it_is_and_how_sure(name: str) -> None:
    """Its first line names the system and the source, which the table of recipes is made from."""
    text = (ROOT / "jobs" / "recipes" / f"{name}.yaml").read_text()
    first = text.split("\n", 1)[0]
    assert first.startswith("# ")
    assert ": " in first
    assert all(source.uri.startswith("s3://data/") for source in load_recipe(name).data.sources.values())
