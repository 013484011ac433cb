"""EVA's towers in CLIP's layout: EVA-CLIP-g against BLIP-2's class, EVA2-CLIP-E against its formula; a model of parts around each."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from families import CONFIGS, Case, case_of, conversation, model_of, pack_of
from torch.nn.functional import gelu, layer_norm
from transformers import AutoModelForImageTextToText, Blip2VisionConfig, Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

from terrace.families.registry import make_family
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.models.families.registry import family_of_model
from terrace.models.forward import pack_hidden
from terrace.models.modules.eva_towers import as_eva, behind_eva
from terrace.models.parts import part_parameters
from terrace.objectives.lm import summed_loss
from terrace.planner.parameters import parameter_counts, part_sizes
from terrace.planner.shapes import shape_of_config
from terrace.recipe.errors import RecipeError
from terrace.recipe.loading import parse_recipe
from terrace.recipe.schema import Model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
VARIANTS = {  # with the connector and language model of their systems: XComposer, CogVLM
    "eva_clip_g": {
        "connector": {"kind": "q_former", "queries": 5, "width": 24, "heads": 3}, "text": {"model_type": "llama", "attention_bias": True},
    },
    "eva2_clip_e": {"connector": {"kind": "glu", "width": 40}, "text": {"model_type": "llama"}},
}  # fmt: skip


def tower(variant: str) -> CLIPVisionModel:
    made = CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act="gelu", layer_norm_eps=1e-6)).double()
    as_eva(made, variant)
    made = made.double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return made


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_eva_clip_g_is_the_tower_of_blip_2():
    ours = tower("eva_clip_g")
    theirs = Blip2VisionModel(Blip2VisionConfig(**SIZES, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True)).double().eval()
    given = ours.state_dict()
    state = {name: tensor for name, tensor in given.items() if "post_layernorm" in name}
    state["embeddings.class_embedding"] = given["embeddings.class_embedding"].view(1, 1, -1)
    state["embeddings.position_embedding"] = given["embeddings.position_embedding.weight"][None]
    for leaf in ("weight", "bias"):
        state[f"embeddings.patch_embedding.{leaf}"] = given[f"embeddings.patch_embedding.{leaf}"]
    for number in range(SIZES["num_hidden_layers"]):
        at = f"encoder.layers.{number}."
        attention = {leaf: given[f"{at}self_attn.{leaf}"] for leaf in ("q_proj.weight", "k_proj.weight", "v_proj.weight")}
        state[f"{at}self_attn.qkv.weight"] = torch.cat(list(attention.values()))
        biases = (given[f"{at}self_attn.q_proj.bias"], torch.zeros(32, dtype=torch.float64), given[f"{at}self_attn.v_proj.bias"])
        state[f"{at}self_attn.qkv.bias"] = torch.cat(biases)
        for leaf in ("weight", "bias"):
            state[f"{at}self_attn.projection.{leaf}"] = given[f"{at}self_attn.out_proj.{leaf}"]
            for module in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{at}{module}.{leaf}"] = given[f"{at}{module}.{leaf}"]
    theirs.load_state_dict(state)
    expected = theirs(pixels()).last_hidden_state
    torch.testing.assert_close(behind_eva(ours, "eva_clip_g", ours(pixels()).last_hidden_state), expected)


@torch.no_grad()
def test_eva2_clip_e_has_its_norms_behind_attention_and_feed_forward():
    ours = tower("eva2_clip_e")
    embeddings, x = ours.embeddings, pixels()
    patches = x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)
    patches = patches @ embeddings.patch_embedding.weight.flatten(1).T + embeddings.patch_embedding.bias
    x = torch.cat([embeddings.class_embedding.expand(2, 1, -1), patches], dim=1) + embeddings.position_embedding.weight
    for layer in ours.encoder.layers:
        attention = layer.self_attn
        q, k, v = (one(x).view(2, 17, 2, 16) for one in (attention.q_proj, attention.k_proj, attention.v_proj))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 4).softmax(-1)
        attended = attention.out_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        x = x + layer_norm(attended, (32,), layer.layer_norm1.weight, layer.layer_norm1.bias, 1e-6)
        given = layer.mlp.fc2(gelu(layer.mlp.fc1(x)))
        x = x + layer_norm(given, (32,), layer.layer_norm2.weight, layer.layer_norm2.bias, 1e-6)
    torch.testing.assert_close(behind_eva(ours, "eva2_clip_e", ours(pixels()).last_hidden_state), x)
    assert not list(ours.post_layernorm.parameters())


@pytest.mark.parametrize("variant", [pytest.param("eva_clip_g", marks=pytest.mark.slow), "eva2_clip_e"])
def test_a_model_of_parts_around_it_is_counted_packed_trained_and_exported(variant, tmp_path):
    torch.set_num_threads(1)
    small, options = case_of("terrace_vlm", tmp_path), VARIANTS[variant]
    values = copy.deepcopy(CONFIGS["terrace_vlm"]) | {
        "connector": options["connector"], "vision_variant": variant, "vision_feature_layer": -1,
        "vision_config": CONFIGS["terrace_vlm"]["vision_config"] | {"hidden_act": "gelu"},
    }  # fmt: skip
    values["text_config"] |= options["text"]
    section = Model.model_validate({"architecture": "terrace_vlm", "config": values})
    config, family = model_config(section, small.tokenizer), make_family("terrace_vlm", section.config or {})
    case = Case("terrace_vlm", section, family, small.tokenizer, config, small.pixels)
    built = build_model(section, config)
    shape = shape_of_config(config.to_dict(), "terrace_vlm")
    assert parameter_counts(shape) == {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(built).items()}
    for part in ("vision", "language"):
        blocks = family_of_model(built).blocks_of(built, part)
        assert part_sizes(shape)[part].block == sum(p.numel() for p in blocks[0].parameters())
    assert not family_of_model(built).unused(config, [name for name, _ in built.named_parameters()])
    model = model_of(case, 0.1)
    use_attention(model, "sdpa_segments")
    samples = [conversation(1, [(90, 60)]), conversation(2, []), conversation(3, [(40, 130), (50, 50)])]
    examples = [pack_of(case, [sample]) for sample in samples]
    with torch.no_grad():
        alone = [pack_hidden(model, to_device(example, "cpu", torch.float32)) for example in examples]
        packed = pack_hidden(model, to_device(pack_of(case, samples), "cpu", torch.float32))
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
    for given in samples[:2]:  # with a picture and without: a gradient for everything
        model.zero_grad()
        summed_loss(model.train(), to_device(pack_of(case, [given]), "cpu", torch.float32), 64).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    final = export_hf(state, config, case.tokenizer.directory, tmp_path / "final", pixels=case.pixels)
    loaded, report = AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.from_numpy(examples[0].input_ids.astype("int64"))[None]
    given = family_of_model(model).normalised(torch.from_numpy(examples[0].pixels), torch.float32).view(-1, 3, 56, 56)
    with torch.no_grad():
        logits = loaded.eval()(input_ids=ids, pixel_values=given).logits[0]
        torch.testing.assert_close(logits, model.lm_head(alone[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vision_variant": "eva_clip"}, "vision_variant: must be one of eva_clip_g, eva2_clip_e"),
        ({"vision_variant": "eva_clip_g", "vision_feature_layer": -2}, "vision_variant: needs a clip_vision_model whose last"),
        ({"text_config": CONFIGS["terrace_vlm"]["text_config"] | {"attention_bias": True}}, "has `attention_bias`, which llama alone has"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes, told):
    with pytest.raises(RecipeError, match=re.escape(told)):
        parse_recipe({
            "name": "r", "model": {"architecture": "terrace_vlm", "config": CONFIGS["terrace_vlm"] | changes},
            "tokenizer": {"train_vocabulary_size": 400}, "data": {"sources": {"a": {"uri": "x"}}},
            "stages": [{"name": "s", "train": {"projector": {"lr": 1e-3}}, "mixture": {"a": 1.0}, "budget": {"steps": 1}}],
        }, "r")  # fmt: skip
