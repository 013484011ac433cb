"""The short decoding step against transformers' own layers: the same answers and log-probabilities, and only where layers are plain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from vllm_world import mismatch, said, world_of

from terrace.generation import native
from terrace.generation.interface import Sampling
from terrace.models.decode_step import BLOCK, DecodeStep, rotated_axes, usual
from terrace.models.families.registry import family_of_model

SAMPLING = Sampling(samples=3, max_tokens=20, seed=4)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_vl", "llava")]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", *SLOW])
def test_it_says_what_transformers_layers_say(name, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    world = world_of(name, tmp_path)
    model = world.model(1)
    assert usual(model)
    used = []
    logits = DecodeStep.logits
    monkeypatch.setattr(DecodeStep, "logits", lambda *arguments: used.append(len(arguments[1])) or logits(*arguments))
    short = world.native(model).generate(world.prompts, SAMPLING)
    assert used
    steps = len(used)
    again = world.native(model).generate(world.prompts, SAMPLING)
    assert len(used) == 2 * steps, "in a model that transformers has run, too"
    assert [[one.logprobs.tolist() for one in group] for group in again] == [[one.logprobs.tolist() for one in group] for group in short]
    assert mismatch(world, model, short, SAMPLING) < 1e-4
    monkeypatch.setattr(native, "usual", lambda model: False)
    steps = len(used)
    long = world.native(model).generate(world.prompts, SAMPLING)
    assert len(used) == steps
    assert said(short) == said(long)
    for one, other in zip(short, long, strict=True):
        assert max(np.abs(a.logprobs - b.logprobs).max() for a, b in zip(one, other)) < 1e-5


class Wrapped(nn.Linear):
    """An adapter around a layer looks like this."""


@pytest.mark.parametrize("change", ["hook", "linear", "layer", "norm", "no norm", "rotation"])
def test_what_was_changed_takes_the_long_way(change, tmp_path):
    model = world_of("qwen2_5_vl", tmp_path).model(1)
    language = family_of_model(model).language(model)
    layer = language.layers[1]
    if change == "hook":
        layer.mlp.register_forward_hook(lambda *_: None)
    elif change == "linear":
        layer.self_attn.q_proj = Wrapped(4, 4)
    elif change == "layer":
        layer.__class__ = type("OtherLayer", (type(layer),), {})
    elif change == "norm":
        language.norm = nn.RMSNorm(4)
    elif change == "no norm":  # by that name
        del language.norm
    else:
        language.rotary_emb.rope_type = "dynamic"
    assert not usual(model)


def test_positions_and_how_far_the_table_goes(tmp_path):
    assert rotated_axes(np.asarray([[3, 4]])).tolist() == [3, 4]
    assert rotated_axes(np.asarray([[9, 9], [3, 4], [3, 4], [3, 4]])).tolist() == [3, 4], "the first of four is the place in the text"
    assert rotated_axes(np.asarray([[9, 9], [3, 4], [3, 5], [3, 4]])) is None
    model = world_of("qwen2_5_vl", tmp_path).model(1)
    far, near = DecodeStep(model), DecodeStep(model)
    states, places = torch.zeros(1, 4), np.asarray([5, 700])
    near._rotations(places, states)
    far._rotations(np.asarray([3 * BLOCK]), states)
    for one, other in zip(near._rotations(places, states), far._rotations(places, states)):
        assert torch.equal(one, other), "the same numbers, however far it has grown"
