"""`only`: some tensors of a part train, the others stay bit for bit; the plan and the groups count the same ones."""

from __future__ import annotations

import pytest
import torch
from packs import tiny_recipe
from ranks import stage_dir, train_stages

from terrace.errors import InputError
from terrace.models.build import build_model, meta_model, model_config
from terrace.models.parts import part_parameters
from terrace.models.weights import Directory
from terrace.planner.adapters import with_adapters
from terrace.planner.flops import assumed_load, training_flops
from terrace.planner.parameters import trainable_counts
from terrace.planner.shapes import model_shape
from terrace.recipe.rules import check
from terrace.train.optimizer import parameter_groups
from terrace.train.setup import freeze_parts


def test_what_is_named_trains_and_nothing_else(tmp_path):
    torch.set_num_threads(1)
    recipe = tiny_recipe(train={"language": {"lr": 1e-3, "only": ["mlp", "self_attn.v_proj"]}}, budget={"steps": 2})
    config = model_config(recipe.model)
    start = dict(build_model(recipe.model, config).named_parameters())
    train_stages(0, 1, recipe.model_dump(mode="json"), str(tmp_path))
    final = Directory(stage_dir(tmp_path, 0) / "final")
    moved = {name for name, parameter in start.items() if not torch.equal(final.read(name), parameter)}
    assert moved == {name for name in start if "language_model" in name and (".mlp." in name or ".self_attn.v_proj." in name)}
    skeleton = meta_model(config)
    freeze_parts(skeleton, recipe.stages[0])
    trained = {name: parameter.numel() for name, parameter in skeleton.named_parameters() if parameter.requires_grad}
    assert set(trained) == moved == {name for group in parameter_groups(skeleton, recipe.stages[0]) for name in group.names}
    shape = with_adapters(model_shape(recipe), recipe.stages[0], recipe.model, config)
    assert trainable_counts(shape, recipe.stages[0]) == {"vision": 0, "projector": 0, "language": sum(trained.values())}
    whole, load = model_shape(recipe), assumed_load(model_shape(recipe), 256, 64, 64, 16)
    cases = ((whole, []), (shape, ["language"]), (whole, ["language"]))
    none, partly, all_of_it = (training_flops(one, load, parts).model for one, parts in cases)
    assert none < partly < all_of_it
    assert sum(p.numel() for _, p in part_parameters(skeleton)["language"]) > sum(trained.values())


def test_words_in_no_name_and_adapters_beside_them_are_refused():
    recipe = tiny_recipe(train={"language": {"lr": 1e-3, "only": ["experts"]}})
    with pytest.raises(InputError, match=r"train.language.only: no tensor of language has experts in its name"):
        freeze_parts(meta_model(model_config(recipe.model)), recipe.stages[0])
    with pytest.raises(InputError, match="no tensor of language has experts"):
        with_adapters(model_shape(recipe), recipe.stages[0], recipe.model)
    both = tiny_recipe(train={"language": {"lr": 1e-3, "only": ["mlp"], "lora": {}}})
    assert any("give one of `only` and `lora`" in str(problem) for problem in check(both))
