"""CogVLM's visual expert: a layer's formula written out, copies to begin with, its part, packs, exports."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import CONFIGS, Case, case_of, conversation, pack_of, random_samples
from transformers import AutoModelForImageTextToText

from terrace.families.registry import make_family
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.models.families.registry import family_of_model
from terrace.models.forward import pack_hidden
from terrace.models.parts import part_parameters
from terrace.objectives.lm import summed_loss
from terrace.planner.parameters import parameter_counts
from terrace.planner.shapes import shape_of_config
from terrace.recipe.schema import Model


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    torch.set_num_threads(1)
    small = case_of("terrace_vlm", tmp_path_factory.mktemp("tokenizers"))
    values = copy.deepcopy(CONFIGS["terrace_vlm"]) | {"visual_expert": True}
    section = Model.model_validate({"architecture": "terrace_vlm", "config": values})
    config = model_config(section, small.tokenizer)
    return Case("terrace_vlm", section, make_family("terrace_vlm", values), small.tokenizer, config, small.pixels)


def shaken(case: Case):
    model = build_model(case.section, case.config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def written_out(model, embeddings: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Qwen2's decoder [L, H] -> [L, H] with each token multiplied by the matrices of its kind."""
    text, length = model.config.text_config, len(embeddings)
    size, groups = text.hidden_size // text.num_attention_heads, text.num_attention_heads // text.num_key_value_heads
    angles = torch.arange(length)[:, None] / 10000.0 ** (torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([angle, angle], dim=-1)[:, None] for angle in (angles.cos(), angles.sin()))

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + text.rms_norm_eps).sqrt() * weight

    def by_kind(x, layer):
        rows = []
        for token, of_image in zip(x, image):
            own = layer.image if of_image else layer
            rows.append(own.weight @ token + (0 if own.bias is None else own.bias))
        return torch.stack(rows)

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    hidden = embeddings
    for layer in model.model.language_model.layers:
        x, attention = norm(hidden, layer.input_layernorm.weight), layer.self_attn
        q, k, v = (by_kind(x, one).view(length, -1, size) for one in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = turned(q), turned(k)
        k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(dim=-1)
        hidden = hidden + by_kind(torch.einsum("hqk,khd->qhd", scores, v).reshape(length, -1), attention.o_proj)
        x, mlp = norm(hidden, layer.post_attention_layernorm.weight), layer.mlp
        hidden = hidden + by_kind(torch.nn.functional.silu(by_kind(x, mlp.gate_proj)) * by_kind(x, mlp.up_proj), mlp.down_proj)
    return norm(hidden, model.model.language_model.norm.weight)


def test_each_kind_of_token_meets_its_own_matrices(case, tmp_path):
    """Written out, in the platform's packed forward and in the class's own; packed equals alone; the export is the model."""
    model = shaken(case)
    use_attention(model, "sdpa_segments")
    samples = [conversation(1, [(90, 60)]), *random_samples(3, seed=4)]
    examples = [pack_of(case, [sample]) for sample in samples]
    family = family_of_model(model)
    with torch.no_grad():
        alone = [pack_hidden(model, to_device(example, "cpu", torch.float32)) for example in examples]
        packed = pack_hidden(model, to_device(pack_of(case, samples), "cpu", torch.float32))
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
        example = examples[0]
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        pixels = family.normalised(torch.from_numpy(example.pixels), torch.float32).view(1, 3, 56, 56)
        features = model.model.get_image_features(pixels).pooler_output[0]
        image = ids == case.config.image_token_id
        embeddings = model.model.language_model.embed_tokens(ids)
        embeddings[image] = features
        torch.testing.assert_close(alone[0], written_out(model, embeddings, image), rtol=1e-4, atol=1e-4)
        use_attention(model, "sdpa")
        logits = model(input_ids=ids[None], pixel_values=pixels).logits[0]
        torch.testing.assert_close(logits, model.lm_head(alone[0]), rtol=1e-4, atol=1e-4)
        state = {name: parameter.detach() for name, parameter in model.named_parameters()}
        final = export_hf(state, case.config, None, tmp_path / "final", pixels=case.pixels)
        loaded = AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float32).eval()
        torch.testing.assert_close(loaded(input_ids=ids[None], pixel_values=pixels).logits[0], logits, rtol=1e-5, atol=1e-5)
        told = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
        out = loaded.generate(input_ids=ids[None], pixel_values=pixels, attention_mask=torch.ones_like(ids[None]), **told)
        again = loaded(input_ids=out, pixel_values=pixels).logits[0, len(ids) - 1 : -1].argmax(dim=-1)
        assert torch.equal(out[0, len(ids) :], again)  # what is generated with a cache is text


def test_experts_begin_as_copies_belong_to_the_projector_and_are_counted(case):
    model = build_model(case.section, case.config)
    plain_section = Model.model_validate({"architecture": "terrace_vlm", "config": CONFIGS["terrace_vlm"]})
    plain = build_model(plain_section, model_config(plain_section, case.tokenizer))
    parameters = dict(model.named_parameters())
    experts = [name for name in parameters if ".image." in name]
    assert len(experts) == 2 * (7 + 3)  # seven matrices and Qwen2's three biases in each layer
    for name in experts:
        assert torch.equal(parameters[name], parameters[name.replace(".image.", ".")])
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, parameters[name])
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(model).items()}
    assert parameter_counts(shape_of_config(case.config.to_dict(), "terrace_vlm")) == counted
    assert set(experts) <= {name for name, _ in part_parameters(model)["projector"]}
    use_attention(model, "sdpa_segments")
    use_attention(plain, "sdpa_segments")
    for sizes in ([(90, 60)], []):
        batch = to_device(pack_of(case, [conversation(3, sizes)]), "cpu", torch.float32)
        torch.testing.assert_close(summed_loss(model, batch, 64), summed_loss(plain, batch, 64), rtol=1e-5, atol=1e-5)
    model.zero_grad()
    summed_loss(model, to_device(pack_of(case, [conversation(3, [])]), "cpu", torch.float32), 64).backward()
    assert all(parameters[name].grad is not None for name in experts)  # text alone: zeros, the same on every rank
