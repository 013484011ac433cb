"""Parameter groups, schedules, loss scale, parts and initial weights: the plain values of training."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packs import tiny_model

from terrace.errors import InputError
from terrace.models.build import build_model, meta_model, model_config, parameter_counts
from terrace.models.families.registry import family_model_named
from terrace.models.parts import has_weight_decay, last_layers, layer_number, part_parameters
from terrace.models.weights import initial_weights
from terrace.recipe.schema import Model, Recipe, Schedule
from terrace.recipe.schema_optimizer import Optimizer
from terrace.train.lars import Lars
from terrace.train.loss_scale import LossScale
from terrace.train.metrics import MetricsLog
from terrace.train.optimizer import group_rates, parameter_groups, schedule_factor, weight_decay_at

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = tiny_model()["config"]


def _model(**changes) -> Model:
    return Model.model_validate({"config": SHAPE, **changes})


def _stage(**changes):
    values = {
        "name": "one", "train": {"vision": {"lr": 1.0, "layer_decay": 0.5}, "language": {"lr": 2.0, "weight_decay": 0.3}},
        "mixture": {"weights": {"a": 1.0}}, "budget": {"steps": 1}, **changes,
    }
    return Recipe.model_validate({
        "name": "r", "model": {"config": SHAPE}, "tokenizer": {"path": "x"},
        "data": {"sources": {"a": {"uri": "x"}}}, "stages": [values],
    }).stages[0]


SKELETON = meta_model(model_config(_model()))
NAMES = [name for name, _ in SKELETON.named_parameters()]
FAMILY = family_model_named("qwen2_5_vl")
part_of, canonical_name = FAMILY.part_of, FAMILY.canonical_name


def test_every_parameter_has_a_part_and_a_layer():
    depths = last_layers(NAMES, FAMILY)
    assert depths == {"vision": 2, "projector": 0, "language": 3}
    assert {part_of(name) for name in NAMES} == {"vision", "projector", "language"}
    assert layer_number("model.visual.patch_embed.proj.weight", depths, FAMILY) == 0
    assert layer_number("model.visual.blocks.1.attn.qkv.weight", depths, FAMILY) == 2
    assert layer_number("model.language_model.embed_tokens.weight", depths, FAMILY) == 0
    assert layer_number("lm_head.weight", depths, FAMILY) == 3
    with pytest.raises(InputError, match="belongs to none"):
        part_of("something.else.weight")


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("model.visual.merger.ln_q.weight", False), ("model.visual.blocks.0.norm1.weight", False),
        ("model.language_model.norm.weight", False), ("model.language_model.layers.0.input_layernorm.weight", False),
        ("model.language_model.layers.0.self_attn.q_proj.bias", False), ("model.visual.patch_embed.proj.weight", True),
        ("lm_head.weight", True),
    ],
)
def test_norms_and_biases_are_not_decayed(name, decayed):
    assert has_weight_decay(name) == decayed


def test_groups_cover_trained_parts_once_with_their_rates():
    groups = parameter_groups(SKELETON, _stage())
    covered = [name for group in groups for name in group.names]
    assert sorted(covered) == sorted(name for name in NAMES if part_of(name) != "projector")
    rates = {name: group for group in groups for name in group.names}
    assert rates["model.visual.blocks.1.attn.qkv.weight"].peak_lr == 1.0
    assert rates["model.visual.blocks.0.attn.qkv.weight"].peak_lr == 0.5
    assert rates["model.visual.patch_embed.proj.weight"].peak_lr == 0.25
    assert rates["lm_head.weight"].peak_lr == 2.0
    assert rates["lm_head.weight"].weight_decay == 0.3
    assert rates["model.visual.patch_embed.proj.weight"].weight_decay == 0.1
    assert rates["model.visual.blocks.0.norm1.weight"].weight_decay == 0.0


def test_muon_is_for_matrices_between_layers():
    stage = _stage()
    muon = stage.model_copy(update={"optimizer": stage.optimizer.model_copy(update={"kind": "muon"})})
    rules = {name: group.rule for group in parameter_groups(SKELETON, muon) for name in group.names}
    assert rules["model.language_model.layers.0.mlp.up_proj.weight"] == rules["model.visual.blocks.1.attn.qkv.weight"] == "muon"
    others = ("lm_head.weight", "model.language_model.embed_tokens.weight", "model.visual.patch_embed.proj.weight",
              "model.language_model.norm.weight", "model.visual.blocks.0.norm1.weight")  # fmt: skip
    assert {rules[name] for name in others} == {"adamw"}
    assert {group.rule for group in parameter_groups(SKELETON, stage)} == {"adamw"}


def test_schedules():
    cosine = Schedule(kind="cosine", warmup=0.1, min_ratio=0.2)
    values = [schedule_factor(cosine, step, 100) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == 1.0
    assert max(values) == 1.0
    assert values[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    linear = Schedule(kind="linear", warmup=4, min_ratio=0.0)
    assert [schedule_factor(linear, step, 9) for step in range(9)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule_factor(Schedule(kind="constant", warmup=0), 50, 100) == 1.0
    stable = Schedule(kind="wsd", warmup=2, decay=4, min_ratio=0.25)
    assert [schedule_factor(stable, step, 10) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    root = Schedule(kind="wsd", warmup=0, decay=0.5, decay_shape="sqrt", min_ratio=0.0)
    assert [schedule_factor(root, step, 10) for step in (4, 5, 6, 9)] == [1.0, 1.0, 0.5, 0.0]
    steps = Schedule(kind="step", warmup=0, milestones=[0.3, 6], factor=0.5)
    assert [schedule_factor(steps, step, 10) for step in range(10)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_weight_decay_goes_to_its_end_by_a_cosine_and_only_where_nothing_else_is_said():
    rising = Optimizer(weight_decay=0.04, final_weight_decay=0.4)
    published = [0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * step / 100)) for step in range(100)]
    np.testing.assert_allclose([weight_decay_at(rising, step, 100) for step in range(100)], published, rtol=1e-12)
    assert weight_decay_at(Optimizer(weight_decay=0.3), 50, 100) == 0.3
    stage = _stage(optimizer={"weight_decay": 0.04, "final_weight_decay": 0.4})
    groups = parameter_groups(SKELETON, stage)
    rates = group_rates(groups, 0.5, 0.1)
    assert [rate for rate, _ in rates] == [0.5 * group.peak_lr for group in groups]
    found = {(group.part, has_weight_decay(group.names[0])): decay for group, (_, decay) in zip(groups, rates)}
    assert found == {("vision", True): 0.1, ("language", True): 0.3, ("vision", False): 0.0, ("language", False): 0.0}


def test_lars_is_its_formula():
    """Of a matrix and a kernel with trust, of a vector without; a matrix of zeros steps as under SGD."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (2, 3, 2, 2), (5,), (2, 2)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    weights[3].data.zero_()
    ours = [weight.detach().clone() for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in ours]
    optimizer = Lars([{"params": weights, "weight_decay": 0.1}], momentum=0.9, trust=0.02)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = rate = 0.5 / (step + 1)
        slopes = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for weight, slope in zip(weights, slopes):
            weight.grad = slope.clone()
        optimizer.step()
        for number, (weight, slope) in enumerate(zip(ours, slopes)):
            slope = slope + 0.1 * weight
            if weight.dim() > 1 and float(weight.norm()):
                slope = slope * (0.02 * weight.norm() / slope.norm())
            momenta[number] = 0.9 * momenta[number] + slope
            ours[number] = weight - rate * momenta[number]
    for weight, expected in zip(weights, ours):
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-14)


def test_loss_scale_halves_at_overflow_and_grows_again():
    scale = LossScale(value=8.0, growth_interval=2)
    scale.after_overflow()
    assert (scale.value, scale.overflows) == (4.0, 1)
    scale.after_step()
    again = LossScale(growth_interval=2)
    again.restore(scale.state())
    again.after_step()
    assert again.value == 8.0


def test_random_weights_depend_on_seed_and_name_alone():
    one, same, other = (build_model(_model(seed=seed), model_config(_model())) for seed in (0, 0, 1))
    for (name, a), (_, b), (_, c) in zip(one.named_parameters(), same.named_parameters(), other.named_parameters()):
        assert torch.equal(a, b), name
        if a.dim() > 1:
            assert not torch.equal(a, c), name
            assert 0.015 < float(a.detach().std()) < 0.025, name


@pytest.fixture
def saved(tmp_path):
    build_model(_model(seed=5), model_config(_model())).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_parts_come_from_different_places(saved):
    reference = dict(build_model(_model(seed=5), model_config(_model())).named_parameters())
    mixed = build_model(_model(init={"vision": str(saved), "language": str(saved)}), model_config(_model()))
    for name, parameter in mixed.named_parameters():
        if parameter.dim() > 1:
            assert torch.equal(parameter, reference[name]) == (part_of(name) != "projector"), name


def test_every_missing_unexpected_and_reshaped_tensor_is_named(saved):
    tensors = load_file(saved / "model.safetensors")
    gone = tensors.pop("visual.blocks.0.norm1.weight")
    tensors["visual.blocks.9.extra.weight"] = gone.clone()
    tensors["visual.merger.mlp.0.bias"] = torch.zeros(7)
    save_file(tensors, saved / "model.safetensors")
    skeleton = meta_model(model_config(_model()))
    with pytest.raises(InputError, match=r"blocks\.0\.norm1\.weight is missing") as caught:
        initial_weights(_model(), skeleton, saved)
    assert "model.visual.merger.mlp.0.bias has shape [7]" in str(caught.value)
    tensors["visual.blocks.0.norm1.weight"] = gone
    tensors["visual.merger.mlp.0.bias"] = torch.zeros(128)
    save_file(tensors, saved / "model.safetensors")
    _, report = initial_weights(_model(), skeleton, saved)
    assert [line.split()[0] for line in report.unexpected] == ["model.visual.blocks.9.extra.weight"]


def test_a_vocabulary_may_grow(saved):
    shape = json.loads(json.dumps(SHAPE))
    shape["text_config"]["vocab_size"] = 520
    bigger = Model.model_validate({"config": shape, "init": {"language": str(saved)}})
    model = build_model(bigger, model_config(bigger))
    old = build_model(_model(seed=5), model_config(_model()))
    assert torch.equal(model.lm_head.weight[:512], old.lm_head.weight)
    assert float(model.lm_head.weight[512:].detach().std()) > 0.01
    _, report = initial_weights(bigger, meta_model(model_config(bigger)))
    assert any("grows from 512 to 520" in note for note in report.notes)


def test_older_spellings_of_names():
    assert canonical_name("visual.blocks.0.norm1.weight") == "model.visual.blocks.0.norm1.weight"
    assert canonical_name("model.layers.3.mlp.up_proj.weight") == "model.language_model.layers.3.mlp.up_proj.weight"
    assert canonical_name("lm_head.weight") == "lm_head.weight"


def test_parameter_counts_of_a_published_shape():
    """Qwen2.5-VL-7B as released has 8,292,166,656 parameters."""
    from terrace.recipe.loading import load_recipe

    recipe = load_recipe(REPOSITORY / "jobs" / "recipes" / "qwen2.5-vl-7b.yaml")
    counts = parameter_counts(recipe)
    assert sum(counts.values()) == 8_292_166_656
    assert counts["language"] == 7_615_616_512


def test_a_tokenizer_still_to_be_trained_counts_with_its_wanted_vocabulary():
    """What `terrace validate` prints and what `terrace plan` counts is the model that the run will build."""
    from terrace.planner.parameters import parameter_counts as planned_counts
    from terrace.planner.shapes import model_shape
    from terrace.recipe.loading import load_recipe

    recipe = load_recipe(REPOSITORY / "jobs" / "recipes" / "demo.yaml")
    counts = parameter_counts(recipe)
    assert counts == planned_counts(model_shape(recipe))
    assert sum(counts.values()) < 2_000_000


def test_tied_output_counts_once_and_survives_materialising():
    shape = {**SHAPE, "tie_word_embeddings": True}
    tied = Model.model_validate({"config": shape})
    model = build_model(tied, model_config(tied))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in {name for name, _ in part_parameters(model)["language"]}


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path, 0)
    for step in (1, 2, 3):
        first.append({"step": step, "loss": math.pi})
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # torn by a crash
    second = MetricsLog(path, 2)
    second.append({"step": 3, "loss": 0.0})
    second.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
