"""Mixtures of experts: the load-balancing loss is that of the global batch however it is packed and spread, and its figures are counted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from expert_steps import SAMPLES, moe_case, train_experts
from families import model_of, pack_of, recipe_model, reference_inputs
from processes import run_ranks
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from terrace.errors import InputError
from terrace.models.build import build_model, meta_model, restore_buffers
from terrace.models.weights import initial_weights
from terrace.planner.parameters import active_parameters, parameter_counts
from terrace.planner.shapes import shape_of_config
from terrace.recipe.rules import check
from terrace.recipe.schema import Model, Recipe

EXPERTS = ["qwen3_vl_moe", "kimi_k25"]
ONE = [[0, 1, 2, 3, 4]]
THREE = [[0, 1], [2], [3, 4]]
FIVE = [[0], [1], [2], [3], [4]]
pytestmark = pytest.mark.parametrize("name", EXPERTS)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def same(line, other, rtol=2e-5):
    for field in ("loss", "grad_norm", "expert_balance_loss"):
        np.testing.assert_allclose(line[field], other[field], rtol=rtol, err_msg=field)
    assert line["expert_tokens"] == other["expert_tokens"]
    assert line["expert_fullest_share"] == other["expert_fullest_share"]


def test_the_balance_of_a_batch_is_the_same_however_it_is_packed(name, tmp_path):
    """One pack (shares from its own forward), several (counted first), and activations computed twice; and its value is transformers'."""
    again = {part: {"lr": 1e-3, "activation_checkpointing": True} for part in ("vision", "projector", "language")}
    runs = [("ddp", ONE, {}), ("ddp", THREE, {}), ("ddp", FIVE, {"train": again}), ("ddp", ONE, {"expert_balance": 0.0})]
    one, three, five, without = train_experts(0, 1, name, runs, str(tmp_path))
    for others in (three, five):
        for line, other in zip(one[1:3], others[1:3]):
            same(line, other)
    first, plain = one[1], without[1]
    assert first["expert_balance_loss"] > 0.5
    assert "expert_balance_loss" not in plain
    assert first["expert_tokens"] == plain["expert_tokens"]
    assert first["loss"] == pytest.approx(plain["loss"] + 3.0 * first["expert_balance_loss"], rel=1e-5)
    assert one[0] == without[0]  # held-out losses are those of the text alone
    case = moe_case(name, tmp_path / "own")
    assert sum(first["expert_tokens"]) == 2 * 2 * sum(pack_of(case, [sample]).tokens for sample in SAMPLES)
    model = build_model(case.section, case.config)
    reference = AutoModelForImageTextToText.from_config(case.config, dtype=torch.float32, attn_implementation="sdpa")
    reference.load_state_dict(model.state_dict())
    expected = published_balance(name, reference, [reference_inputs(case, pack_of(case, [sample]), reference) for sample in SAMPLES])
    assert first["expert_balance_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mtp", "medusa"])
def test_a_stage_with_heads_balances_the_model_s_experts_too(name, objective, tmp_path):
    """However it is packed; the pass that counts first is not among the heads' figures."""
    stage = {"objective": objective, "train": {part: {"lr": 1e-3} for part in ("vision", "projector", "language", "heads")}}
    runs = [("ddp", packs, stage | {"expert_balance": weight}) for packs, weight in ((ONE, 3.0), (THREE, 3.0), (ONE, 0.0))]
    one, three, without = ([line for line in lines if "step_seconds" in line] for lines in train_experts(0, 1, name, runs, str(tmp_path)))
    for line, other in zip(one, three):
        same(line, other)
        np.testing.assert_allclose([line["own_loss"], line["head_1_loss"]], [other["own_loss"], other["head_1_loss"]], rtol=2e-5)
    assert one[0]["own_loss"] == pytest.approx(without[0]["own_loss"], rel=1e-6)
    assert one[0]["loss"] == pytest.approx(without[0]["loss"] + 3.0 * one[0]["expert_balance_loss"], rel=1e-5)


def published_balance(name, reference, samples):
    """By the class's own forward on each sample: transformers' loss over all tokens, or DeepSeek-V3's of each sequence, written out."""
    heard = []
    for layer in reference.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: heard.append((output[0].float(), output[2])))
    with torch.no_grad():
        for inputs in samples:
            reference(**inputs, use_cache=False)
    layers = len(reference.model.language_model.layers)
    if name == "qwen3_vl_moe":
        joined = tuple(torch.cat([logits for logits, _ in heard[layer::layers]]) for layer in range(layers))
        return float(load_balancing_loss_func(joined, 8, 2))
    losses = []
    for logits, chosen in heard:
        scores = logits.sigmoid() / logits.sigmoid().sum(dim=1, keepdim=True)
        shares = torch.nn.functional.one_hot(chosen, 8).sum(dim=(0, 1)) * 8 / (2 * len(logits))
        losses.append(float((shares * scores.mean(dim=0)).sum()))
    return sum(losses) / len(samples)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_balance_is_that_of_one_process_under_every_strategy(name, tmp_path):
    """Two ranks, one and two packs each, one rank with a pack less, and two ranks that share a pack."""
    alone = train_experts(0, 1, name, [("ddp", packs, {}) for packs in (THREE, THREE[:2])], str(tmp_path))
    runs = [(strategy, packs, {}) for strategy in ("ddp", "fsdp", "zero1", "zero2", "zero3") for packs in (THREE, THREE[:2])]
    shared = {"parallel": {"strategy": "ddp", "sequence_parallel": 2}}
    runs += [("ddp", packs, shared) for packs in (THREE, THREE[:2])] if name == "qwen3_vl_moe" else []
    together = run_ranks(2, train_experts, name, runs, str(tmp_path), timeout=800)[0]
    for number, run in enumerate(runs):
        for line, other in zip(alone[number % 2][1:3], together[number][1:3]):
            assert line["expert_tokens"] == other["expert_tokens"], run
            same(line, other, 1e-4)


def test_computing_buffers_again_leaves_the_parameters_beside_them(name, tmp_path):
    case = moe_case(name, tmp_path)
    model = build_model(case.section, case.config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    restore_buffers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_active_and_total_parameters_are_counted(name, tmp_path):
    case = moe_case(name, tmp_path)
    shape = shape_of_config(case.config.to_dict(), name)
    model = meta_model(case.config)
    experts, chosen = shape.language.experts.count, shape.language.experts.per_token
    idle = sum(p.numel() * (experts - chosen) // experts for key, p in model.named_parameters() if ".experts." in key and p.dim() == 3)
    assert idle > 0
    assert sum(parameter_counts(shape).values()) - sum(active_parameters(shape).values()) == idle


@pytest.mark.slow
def test_published_matrices_of_experts_are_read_and_written_as_published(name, tmp_path):
    """transformers' own `save_pretrained` writes the published order; a directory of it is a start like any other."""
    case = moe_case(name, tmp_path)
    model = model_of(case, 0.05)
    published = AutoModelForImageTextToText.from_config(case.config, dtype=torch.float32)
    published.load_state_dict(model.state_dict())
    published.save_pretrained(tmp_path / "published")
    section = Model.model_validate({"architecture": name, "pretrained": str(tmp_path / "published")})
    source, report = initial_weights(section, meta_model(case.config))
    assert report.unexpected == []
    for key, parameter in model.named_parameters():
        assert torch.equal(source(key), parameter), key
    wrong = dataclasses.replace(case, config=case.config)
    wrong.config.text_config.moe_intermediate_size += 16
    with pytest.raises(InputError, match="experts"):
        initial_weights(section, meta_model(wrong.config))


def test_a_weight_where_nothing_is_balanced_is_refused(name):
    def problems(architecture, stage):
        recipe = Recipe.model_validate({
            "name": "r", "model": recipe_model(architecture), "tokenizer": {"train_vocabulary_size": 400},
            "data": {"sources": {"a": {"uri": "x", "kind": "caption"}}},
            "stages": [{"name": "s", "train": {"language": {"lr": 1e-3}}, "mixture": {"weights": {"a": 1.0}}, "budget": {"steps": 1},
                        "precision": "fp32", "expert_balance": 0.01, **stage}],
        })  # fmt: skip
        return [str(problem) for problem in check(recipe)]

    assert problems(name, {}) == []
    assert "no experts" in problems("llava", {})[0]
    assert "frozen" in problems(name, {"train": {"projector": {"lr": 1e-3}}})[0]
