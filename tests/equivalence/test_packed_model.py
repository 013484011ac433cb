"""The model on packs: equal to transformers' own forward, to unpacked samples, and without leaks between samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packs import IMAGE_PAD, pack_segments, random_pack, reference_images, segment, tiny_model, tiny_recipe
from transformers import Qwen2_5_VLForConditionalGeneration

from terrace.errors import DamagedData, InputError
from terrace.models.attention import choose_backend, runs_of_equal_length, use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, model_config
from terrace.models.families.registry import family_model_named
from terrace.models.forward import pack_hidden, pack_logits_hidden
from terrace.objectives.lm import empty_pack, summed_loss
from terrace.recipe.schema import Model
from terrace.train.setup import checkpoint_activations, freeze_parts

FAMILY = family_model_named("qwen2_5_vl")


def _model(architecture: str = "qwen2_5_vl"):
    values = tiny_model(architecture=architecture)
    if architecture == "qwen2_vl":
        values["config"]["vision_config"] = {
            "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        }
    recipe = Model.model_validate(values)
    model = build_model(recipe, model_config(recipe))
    use_attention(model, "sdpa_segments")
    return model.train()


def _batch(pack):
    return to_device(pack, "cpu", torch.float32)


def _segments(seed: int = 0):
    rng = np.random.default_rng(seed)
    return [segment(rng, 20, [(5, 3)]), segment(rng, 31), segment(rng, 12, [(2, 2), (6, 4)])]


def _gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _assert_close(left: torch.Tensor, right: torch.Tensor, tolerance: float, what: str = "") -> None:
    scale = max(float(right.abs().max()), 1e-12)
    assert float((left - right).abs().max()) / scale < tolerance, what


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen2_vl"])
def test_packed_training_equals_unpacked(architecture):
    model, parts = _model(architecture), _segments()
    packed = summed_loss(model, _batch(pack_segments(0, parts)), 16)
    packed.backward()
    packed_gradients = _gradients(model)
    alone = [summed_loss(model, _batch(pack_segments(0, [part])), 16) for part in parts]
    for loss in alone:
        loss.backward()
    _assert_close(packed.detach(), torch.stack(alone).sum().detach(), 1e-6)
    for name, gradient in _gradients(model).items():
        _assert_close(packed_gradients[name], gradient, 2e-6, name)


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changing_one_sample_moves_no_other(architecture, changed):
    model, parts = _model(architecture), _segments()
    other = list(parts)
    ids, targets, positions, patches, grids = parts[changed]
    ids = np.where(ids < 500, (ids + 7) % 500, ids).astype(np.int32)
    other[changed] = (ids, targets, positions, (255 - patches).astype(np.uint8), grids)
    with torch.no_grad():
        before, _ = pack_logits_hidden(model, _batch(pack_segments(0, parts)))
        after, _ = pack_logits_hidden(model, _batch(pack_segments(0, other)))
    ends = np.cumsum([len(part[0]) for part in parts])
    for index, (start, end) in enumerate(zip([0, *ends], ends)):
        same = torch.equal(before[start:end], after[start:end])
        assert same == (index != changed), f"segment {index}"


def test_adapter_equals_transformers_own_forward():
    model = _model()
    reference = Qwen2_5_VLForConditionalGeneration(model_config(Model.model_validate(tiny_model())))
    reference.load_state_dict(model.state_dict())
    use_attention(reference, "sdpa")
    reference.eval()
    for part in _segments():
        batch = _batch(pack_segments(0, [part]))
        with torch.no_grad():
            ours, _ = pack_logits_hidden(model, batch)
            theirs = reference(
                input_ids=batch.input_ids, **reference_images(batch.example),
                mm_token_type_ids=(batch.input_ids == IMAGE_PAD).int(), use_cache=False,
                attention_mask=torch.ones_like(batch.input_ids),
            ).logits[0]
        _assert_close(ours, theirs, 1e-5)


def test_text_only_and_empty_packs_leave_every_parameter_a_zero_or_real_gradient():
    model = _model()
    summed_loss(model, _batch(random_pack(0, with_images=False)), 16).backward()
    gradients = _gradients(model)
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert all(not g.any() for name, g in gradients.items() if FAMILY.part_of(name) != "language")
    assert gradients["lm_head.weight"].any()
    loss = summed_loss(model, _batch(empty_pack()), 16)
    loss.backward()
    assert loss.item() == 0
    gradients = _gradients(model)
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
def test_chunked_cross_entropy_equals_plain(chunk):
    model, pack = _model(), random_pack(3)
    loss = summed_loss(model, _batch(pack), chunk)
    (loss * 0.25).backward()
    chunked = _gradients(model)
    logits = torch.nn.functional.linear(pack_hidden(model, _batch(pack)), model.lm_head.weight)
    plain = torch.nn.functional.cross_entropy(logits, torch.from_numpy(pack.targets).long(), reduction="sum")
    (plain * 0.25).backward()
    _assert_close(loss.detach(), plain.detach(), 1e-6)
    for name, gradient in _gradients(model).items():
        _assert_close(chunked[name], gradient, 2e-6, name)


def test_frozen_parts_may_recompute_what_gradients_pass_through():
    """Only the projector trains; recomputing the frozen language model changes no bit and really happens."""
    stage = tiny_recipe().stages[0]
    kept, recomputed = (
        stage.model_copy(update={"train": stage.train.model_copy(update={"vision": None, "language": None}),
                                 "frozen_activation_checkpointing": on})
        for on in (False, True)
    )  # fmt: skip
    results, calls = [], []
    for choice in (kept, recomputed):
        model = _model()
        freeze_parts(model, choice)
        checkpoint_activations(model, choice)
        forwards = []
        hook = model.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        loss = summed_loss(model, _batch(pack_segments(0, _segments())), 16)
        loss.backward()
        hook.remove()
        results.append((loss.detach(), _gradients(model)))
        calls.append(len(forwards))
    assert calls == [1, 2]
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert {FAMILY.part_of(name) for name in results[0][1]} == {"projector"}
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_placeholders_that_do_not_match_the_images_are_named():
    model, pack = _model(), random_pack(0)
    pack.image_facts, pack.image_tokens, pack.image_rows = pack.image_facts[:-1], pack.image_tokens[:-1], pack.image_rows[:-1]
    pack.pixels = pack.pixels[: int(pack.image_rows.sum())]
    with pytest.raises(DamagedData, match="sample-0-0"):
        pack_hidden(model, _batch(pack))


def test_attention_without_segments_is_refused_not_wrong():
    model = _model()
    with pytest.raises(InputError, match="without segment boundaries"):
        model.model.language_model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_choice_of_attention_is_stated():
    assert choose_backend("auto", "cpu", "bf16")[0] == "sdpa_segments"
    assert choose_backend("auto", "cuda", "bf16")[0] == "varlen"
    assert choose_backend("auto", "cuda", "fp32")[0] == "sdpa_segments"
    with pytest.raises(InputError, match="needs a CUDA device"):
        choose_backend("varlen", "cpu", "bf16")


def test_runs_of_equal_length():
    assert runs_of_equal_length([0, 64, 128, 160, 160, 192, 200]) == [(0, 64, 2), (128, 32, 2), (192, 8, 1)]
