"""Compiled transformer blocks: the same losses, gradients, names and checkpoints, in graphs whose number does not grow with the packs."""

from __future__ import annotations

import functools

import pytest
import torch
from adapted import ADAPTED, adapted_case
from families import CONFIGS, case_of, conversation, model_of, pack_of, random_samples
from traced import Traced

from terrace.errors import InputError
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.compiled import check_compiler, compile_blocks, missing_for_cuda
from terrace.models.families.registry import family_of_model
from terrace.models.parts import transformer_blocks
from terrace.objectives.lm import summed_loss

NAMES = [*CONFIGS, *ADAPTED]


def passes(model, packs):
    """(loss, gradients by name) of each pack."""
    found = []
    for pack in packs:
        model.zero_grad()
        loss = summed_loss(model, pack, 64)
        if loss.requires_grad:
            loss.backward()
        gradients = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}
        found.append((float(loss), gradients))
    return found


def assert_same_passes(compiled_ones, plain_ones, loss_tolerance, gradient_tolerance):
    for (loss, gradients), (expected, others) in zip(compiled_ones, plain_ones, strict=True):
        assert loss == pytest.approx(expected, rel=loss_tolerance)
        assert gradients.keys() == others.keys()
        top = max(float(tensor.abs().max()) for tensor in others.values())
        for name, tensor in others.items():
            limit = gradient_tolerance * max(float(tensor.abs().max()), 1e-3 * top)
            assert float((gradients[name] - tensor).abs().max()) <= limit, name


@pytest.fixture
def fresh():
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_in_a_bounded_number_of_graphs(tmp_path, fresh, name):
    """With frozen and recomputed blocks; packs of other lengths, numbers of samples and pictures compile nothing anew."""
    case = adapted_case(name, tmp_path) if name in ADAPTED else case_of(name, tmp_path)
    single = 1 if name in ("paligemma", "blip_2", "instructblip") else None
    packs = [random_samples(count, seed) for seed, count in enumerate((3, 2, 4, 6))]
    packs = [[conversation(1, [(70 + 9 * count, 60)]) for count in range(len(pack))] if single else pack for pack in packs]
    batches = [to_device(pack_of(case, pack), "cpu", torch.float32) for pack in packs]
    found, counts, graphs = {}, [], Traced()
    for way in ("plain", "compiled"):
        model = model_of(case)
        model.requires_grad_(True)
        use_attention(model, "sdpa_segments")
        model.train()
        family = family_of_model(model)
        for block in family.blocks_of(model, "vision")[:1]:
            block.requires_grad_(False)
        for block in family.blocks_of(model, "language"):
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        names = list(model.state_dict())
        if way == "compiled":
            hooked = len(family.blocks_of(model, "vision")) if name == "window_adapters" else 0
            assert compile_blocks(model, graphs) == len(transformer_blocks(model)) - hooked > 0
        found[way] = []
        for batch in batches:
            found[way] += passes(model, [batch])
            counts.append(graphs.count)
        assert list(model.state_dict()) == names
    assert_same_passes(found["compiled"], found["plain"], 1e-6, 1e-4)
    before, *later = counts[-4:]
    assert before > 0
    assert later[-1] == later[-2], "the number of graphs grows with the packs"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe", "terrace_vlm"])
def test_kernels_give_the_same_numbers(tmp_path, fresh, name):
    """Through Inductor's own C++: losses within 1e-6."""
    case = case_of(name, tmp_path)
    batches = [to_device(pack_of(case, random_samples(3 + seed, seed)), "cpu", torch.float32) for seed in range(2)]
    found = {}
    for way in ("plain", "compiled"):
        model = model_of(case)
        use_attention(model, "sdpa_segments")
        model.train()
        if way == "compiled":
            compile_blocks(model)
        found[way] = passes(model, batches)
    assert_same_passes(found["compiled"], found["plain"], 1e-6, 1e-4)


def test_blocks_with_hooks_inside_are_left_as_they_are(tmp_path):
    model = model_of(adapted_case("window_adapters", tmp_path))
    hooked = len(family_of_model(model).blocks_of(model, "vision"))
    plain = [block for block in transformer_blocks(model) if block in list(family_of_model(model).blocks_of(model, "language"))]
    assert compile_blocks(model, Traced()) == len(transformer_blocks(model)) - hooked == len(plain) > 0
    assert all("forward" in vars(block) for block in plain)


def test_without_a_compiler_it_is_refused_with_what_is_missing(monkeypatch):
    check_compiler("cpu")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(InputError, match=r"parallel.compile: true needs a C\+\+ compiler \(apt install g\+\+\)"):
        check_compiler("cpu")
    assert missing_for_cuda() is not None  # no GPU here
    with pytest.raises(InputError, match=r"needs the package triton|needs a GPU that Triton knows"):
        check_compiler("cuda")
