"""Connectors between a tower and a language model of different origin: each against its formula, counted, exported with its code."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONFIGS, TEXT, TOWER, case_of, conversation, model_of, pack_of
from torch import nn

from terrace.families.connector import Connector
from terrace.families.registry import make_family
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.models.families.registry import family_of_model
from terrace.models.modules.connectors import make_connector
from terrace.models.modules.sine_positions import resized_positions, sine_positions
from terrace.models.parts import part_parameters
from terrace.objectives.lm import summed_loss
from terrace.planner.parameters import part_sizes
from terrace.planner.shapes import shape_of_config
from terrace.recipe.loading import parse_recipe
from terrace.recipe.rules import check
from terrace.recipe.schema import Model

KINDS = {
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp", "layers": 3},
    "mlp_layer_norm": {"kind": "mlp_layer_norm"},
    "glu": {"kind": "glu", "width": 12},
    "pixel_shuffle_mlp": {"kind": "pixel_shuffle_mlp", "merge": 2},
    "resampler": {"kind": "resampler", "queries": 9, "heads": 4},
    "resampler-keys": {"kind": "resampler", "queries": 6, "heads": 2, "positions": "keys", "output_projection": "projector"},
    "resampler-tower": {"kind": "resampler", "queries": 4, "heads": 4, "output_projection": "vision"},
    "q_former": {"kind": "q_former", "queries": 5, "layers": 3, "width": 24, "heads": 3},
}
W, H, ROWS, COLUMNS = 20, 32, 4, 6


def connector_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = make_connector(Connector.model_validate(KINDS[name]).model_dump(), W, H).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return made


def features() -> torch.Tensor:
    return torch.randn(2, ROWS * COLUMNS, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def norm(x: np.ndarray, module: nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + module.eps)
    return scaled * module.weight.detach().numpy() + module.bias.detach().numpy()


def linear(x: np.ndarray, module: nn.Linear) -> np.ndarray:
    out = x @ module.weight.detach().numpy().T
    return out if module.bias is None else out + module.bias.detach().numpy()


def test_sine_positions_are_their_formula_and_stretch_by_bicubic_convolution():
    """Numbers one by one; the stretched table by the cubic kernel with a = -0.75, whose places outside are the border's."""
    width, rows, columns = 16, 3, 5
    table = sine_positions(width, rows, columns).numpy()
    for row in range(rows):
        for column in range(columns):
            for half, place in enumerate((column, row)):
                for number in range(width // 4):
                    angle = place / 10000 ** (2 * number / (width // 2))
                    found = table[row * columns + column, half * width // 2 :]
                    assert found[number] == pytest.approx(math.sin(angle), abs=1e-6)
                    assert found[number + width // 4] == pytest.approx(math.cos(angle), abs=1e-6)

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def weights(out: int, size: int) -> np.ndarray:
        matrix = np.zeros((out, size))
        for place in range(out):
            centre = (place + 0.5) * size / out - 0.5
            for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
                matrix[place, min(max(tap, 0), size - 1)] += kernel(centre - tap)
        return matrix

    grid = 4
    square = sine_positions(width, grid, grid).numpy().reshape(grid, grid, width)
    expected = np.einsum("ar,bc,rcw->abw", weights(6, grid), weights(7, grid), square).reshape(42, width)
    np.testing.assert_allclose(resized_positions(width, grid, 6, 7).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "mlp", "mlp_layer_norm", "glu", "pixel_shuffle_mlp"])
def test_mlps_are_their_formulas(name):
    made, given = connector_of(name), features()
    x = given.numpy()
    if name == "pixel_shuffle_mlp":  # cell by cell, neighbours row by row
        cells = x.reshape(2, ROWS, COLUMNS, W)
        long = [
            np.concatenate([cells[:, 2 * r + dr, 2 * c + dc] for dr in (0, 1) for dc in (0, 1)], axis=-1)
            for r in range(ROWS // 2) for c in range(COLUMNS // 2)
        ]  # fmt: skip
        expected = linear(gelu(linear(norm(np.stack(long, axis=1), made.norm), made.up_proj)), made.down_proj)
    elif name == "glu":
        inner = gelu(norm(linear(x, made.linear), made.norm))
        gate = linear(inner, made.gate_proj)
        expected = linear(gate / (1 + np.exp(-gate)) * linear(inner, made.up_proj), made.down_proj)
    else:
        expected = x
        for number, layer in enumerate(made.layers):
            expected = linear(gelu(expected) if number else expected, layer)
            expected = expected if made.norms is None else norm(expected, made.norms[number])
    np.testing.assert_allclose(made(given, ROWS, COLUMNS).detach().numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["resampler", "resampler-keys", "resampler-tower"])
def test_a_resampler_is_one_cross_attention_of_queries_with_positions(name):
    """torch's own multi-head attention with the same weights, positions added as published; head by head in double precision."""
    made, given = connector_of(name), features()
    attention = nn.MultiheadAttention(H, made.heads, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([made.q_proj.weight, made.k_proj.weight, made.v_proj.weight]))
        attention.in_proj_bias.copy_(torch.cat([made.q_proj.bias, made.k_proj.bias, made.v_proj.bias]))
        attention.out_proj.weight.copy_(made.o_proj.weight)
        attention.out_proj.bias.copy_(made.o_proj.bias)
    values = torch.from_numpy(norm(linear(given.numpy(), made.kv_proj), made.kv_norm))
    queries = torch.from_numpy(norm(made.query.detach().numpy(), made.query_norm))
    if name != "resampler-keys":
        grid = math.isqrt(len(queries))
        queries = queries + sine_positions(H, grid, grid).double()
        keys = values + resized_positions(H, grid, ROWS, COLUMNS).double()
    else:
        keys = values + sine_positions(H, ROWS, COLUMNS).double()
    expected = attention(queries.expand(2, -1, -1), keys, values, need_weights=False)[0].detach().numpy()
    if made.output_proj is not None:
        expected = linear(norm(expected, made.output_norm), made.output_proj)
    np.testing.assert_allclose(made(given, ROWS, COLUMNS).detach().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_a_q_former_is_that_of_blip_2():
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    made, given = connector_of("q_former"), features()
    config = Blip2QFormerConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, cross_attention_frequency=2,
        encoder_hidden_size=W, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = Blip2QFormerModel(config).double().eval()

    def give(target: nn.Module, source: nn.Module) -> None:
        with torch.no_grad():
            target.weight.copy_(source.weight)
            target.bias.copy_(source.bias)

    give(theirs.layernorm, made.query_norm)
    for ours, layer in zip(made.layers, theirs.encoder.layer):
        pairs = [(ours.own_attention, layer.attention)]
        if ours.picture_attention is not None:
            pairs.append((ours.picture_attention, layer.crossattention))
        for own, other in pairs:
            give(other.attention.query, own.q_proj)
            give(other.attention.key, own.k_proj)
            give(other.attention.value, own.v_proj)
            give(other.output.dense, own.o_proj)
            give(other.output.LayerNorm, own.norm)
        give(layer.intermediate_query.dense, ours.up_proj)
        give(layer.output_query.dense, ours.down_proj)
        give(layer.output_query.LayerNorm, ours.norm)
    hidden = theirs(query_embeds=made.query.expand(2, -1, -1), encoder_hidden_states=given).last_hidden_state
    expected = linear(hidden.detach().numpy(), made.output_proj)
    np.testing.assert_allclose(made(given, ROWS, COLUMNS).detach().numpy(), expected, rtol=1e-6, atol=1e-8)


def config_of(name: str, tower: str = "clip_vision_model", language: str = "qwen2", layer: int = -2) -> dict:
    vision = TOWER | {"model_type": tower, "image_size": 56, "patch_size": 14}
    if tower == "siglip_vision_model":
        vision["vision_use_head"] = False
    text = TEXT | {"model_type": language, "head_dim": 16} if language == "qwen3" else TEXT | {"model_type": language}
    return {
        "text_config": text, "vision_config": vision, "connector": KINDS[name], "vision_feature_layer": layer, "tie_word_embeddings": False,
        "image_layout": "square", "image_token_id": 447,
    }  # fmt: skip


COMBINATIONS = [
    *((name, "clip_vision_model", "qwen2", -2) for name in KINDS), ("mlp", "siglip_vision_model", "llama", -1),
    ("resampler", "siglip_vision_model", "qwen3", -2), ("resampler", "clip_vision_model", "mistral", -1),
]  # fmt: skip


def test_every_combination_is_counted_exactly_and_trains(tmp_path):
    """Parameters, those that never train, tokens by arithmetic, a gradient for everything else, blanks for text alone."""
    torch.set_num_threads(1)
    tokens = {name: options.get("queries", 4 if name == "pixel_shuffle_mlp" else 16) for name, options in KINDS.items()}
    for name, tower, language, layer in COMBINATIONS:
        values = config_of(name, tower, language, layer)
        section = Model.model_validate({"architecture": "terrace_vlm", "config": values})
        config = model_config(section)
        model, where = build_model(section, config), (name, tower, language, layer)
        sizes = part_sizes(shape_of_config(config.to_dict(), "terrace_vlm"))
        counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(model).items()}
        assert {part: size.total for part, size in sizes.items()} == counted, where
        parameters = dict(model.named_parameters())
        unused = family_of_model(model).unused(config, list(parameters))
        assert sum(parameters[one].numel() for one in unused) == sizes["vision"].unused, where
        assert make_family("terrace_vlm", values).view(90, 40, (1, 10**6)).tokens == tokens[name]
        case = case_of("terrace_vlm", tmp_path)
        own = type(case)("terrace_vlm", section, make_family("terrace_vlm", values), case.tokenizer, config, case.pixels)
        config.image_token_id = case.config.image_token_id
        model.config.image_token_id = case.config.image_token_id
        use_attention(model, "sdpa_segments")
        summed_loss(model, to_device(pack_of(own, [conversation(1, [(90, 40)]), conversation(2, [])]), "cpu", torch.float32), 64).backward()
        idle = [one for one, parameter in parameters.items() if parameter.grad is None and one not in unused]
        assert not idle, (where, idle)
        model.zero_grad()
        summed_loss(model, to_device(pack_of(own, [conversation(2, [])]), "cpu", torch.float32), 64).backward()
        assert all(parameters[one].grad is not None for one in parameters if one not in unused), where


def test_tower_and_language_model_come_from_two_checkpoints(tmp_path):
    from transformers import CLIPConfig, CLIPModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tower = {key: value for key, value in config_of("mlp")["vision_config"].items() if key != "model_type"}
    clip = CLIPModel(CLIPConfig(vision_config=tower, text_config={**TOWER, "vocab_size": 50}, projection_dim=16))
    text = {key: value for key, value in TEXT.items() if key != "model_type"}
    language = Qwen2ForCausalLM(Qwen2Config(**text, tie_word_embeddings=False))
    clip.save_pretrained(tmp_path / "clip")
    language.save_pretrained(tmp_path / "language")
    section = Model.model_validate({
        "architecture": "terrace_vlm", "config": config_of("resampler-tower"),
        "init": {"vision": str(tmp_path / "clip"), "language": str(tmp_path / "language")},
    })  # fmt: skip
    model = build_model(section, model_config(section))
    for mine, theirs in ((model.model.vision_tower, clip.vision_model), (model.model.language_model, language.model)):
        expected = dict(theirs.named_parameters())
        assert set(expected) == {name for name, _ in mine.named_parameters()}
        assert all(torch.equal(parameter, expected[name]) for name, parameter in mine.named_parameters())
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)
    assert family_of_model(model).part_of("model.multi_modal_projector.output_proj.weight") == "vision"  # new, not in the checkpoint
    assert float(model.model.multi_modal_projector.output_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert float(model.model.multi_modal_projector.query.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_an_export_carries_its_code_and_loads_where_there_is_no_terrace(tmp_path):
    """Another process, without this package: the same logits from the directory alone, and plain tensors."""
    case = case_of("terrace_vlm", tmp_path)
    model = model_of(case, 0.05)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    final = export_hf(state, case.config, case.tokenizer.directory, tmp_path / "final", pixels=case.pixels)
    example = pack_of(case, [conversation(1, [(90, 60)])])
    family = family_of_model(model)
    pixels = family.normalised(torch.from_numpy(example.pixels), torch.float32).view(1, 3, 56, 56)
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    use_attention(model, "sdpa")
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
    torch.save({"ids": ids, "pixels": pixels, "expected": expected}, tmp_path / "given.pt")
    program = (
        "import sys, torch; from transformers import AutoModelForImageTextToText, AutoConfig\n"
        "assert 'terrace' not in sys.modules\n"
        "given = torch.load(sys.argv[2])\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()\n"
        "out = model(input_ids=given['ids'], pixel_values=given['pixels']).logits\n"
        "torch.testing.assert_close(out, given['expected'], rtol=1e-5, atol=1e-5)\n"
        "assert 'terrace' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(final), str(tmp_path / "given.pt")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in final.glob("*.py")} == {
        "configuration_terrace_vlm.py", "modeling_terrace_vlm.py", "connectors.py", "resampler.py", "q_former.py", "sine_positions.py",
        "sparse_mlp.py", "visual_expert.py", "modality_adapters.py", "window_adapters.py", "padded_pictures.py",
            "eva_towers.py",
    }  # fmt: skip


def test_a_recipe_s_connector_is_checked_by_name(tmp_path: Path):
    def problems(connector: dict, **config) -> list[str]:
        base = {key: value for key, value in CONFIGS["terrace_vlm"].items() if key != "connector"}
        recipe = parse_recipe({
            "name": "r", "tokenizer": {"train_vocabulary_size": 400}, "data": {"sources": {"a": {"uri": "x"}}},
            "model": {"architecture": "terrace_vlm", "connector": connector, "config": {**base, **config}},
            "stages": [{"name": "s", "train": {"projector": {"lr": 1e-3}}, "mixture": {"a": 1.0}, "budget": {"steps": 1},
                        "sequence_length": 4096, "precision": "fp32"}],
        })  # fmt: skip
        assert recipe.model.config["connector"]["kind"] == connector["kind"]
        return [str(problem) for problem in check(recipe)]

    assert problems({"kind": "resampler", "queries": 16, "heads": 4}) == []
    with pytest.raises(Exception, match=r"model.connector.queries: 7 queries form no square grid"):
        problems({"kind": "resampler", "queries": 7, "heads": 4})
    with pytest.raises(Exception, match=r"model.connector.merge: is an option of pixel_shuffle_mlp, not of mlp"):
        problems({"kind": "mlp", "merge": 4})
    with pytest.raises(Exception, match=r"model.connector.merge: 3 does not divide the 4 patches"):
        problems({"kind": "pixel_shuffle_mlp", "merge": 3})
    with pytest.raises(Exception, match=r"image_layout.*must be one of square, padded, tiles.*did you mean `padded`"):
        problems({"kind": "mlp"}, image_layout="paded")
    with pytest.raises(Exception, match=r"model.connector.kind"):
        problems({"kind": "mpl"})

