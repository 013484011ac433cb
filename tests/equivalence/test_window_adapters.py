"""Monkey's adapters of windows: a block's formula written out, their part and counts, packs, an export and its image processor."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from adapted import WINDOW_RANKS, adapted_case, adapted_config
from families import Case, conversation, model_of, pack_of, picture
from PIL import Image
from torch.nn.functional import layer_norm
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model
from terrace.models.export import export_hf
from terrace.models.families.registry import family_of_model
from terrace.models.forward import pack_hidden
from terrace.models.parts import part_parameters
from terrace.objectives.lm import summed_loss
from terrace.planner.parameters import parameter_counts, part_sizes
from terrace.planner.shapes import shape_of_config
from terrace.recipe.errors import RecipeError
from terrace.recipe.loading import parse_recipe

CONFIG = adapted_config("window_adapters")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    torch.set_num_threads(1)
    return adapted_case("window_adapters", tmp_path_factory.mktemp("tokenizers"))


def written_out(tower, pixels: torch.Tensor, window: int | None) -> torch.Tensor:
    """CLIP's tower over one square [3, S, S] -> [1 + P, W]; `window`: whose adapters are added, None for an overview."""
    config, (seen,) = tower.config, (tower.embeddings(pixels[None]),)
    x = tower.pre_layrnorm(seen)[0]
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for block in tower.encoder.layers:
        adapters = block.window_adapters

        def added(x, down, up, window=window):
            return 0.0 if window is None else (x @ down.weight[window].T * down.scale[window]) @ up.weight[window].T

        norm = layer_norm(x, x.shape[-1:], block.layer_norm1.weight, block.layer_norm1.bias, config.layer_norm_eps)
        q, k, v = (
            (norm @ layer.weight.T + layer.bias + added(norm, adapters.attention_down, up)).view(-1, heads, size)
            for layer, up in (
                (block.self_attn.q_proj, adapters.q_up), (block.self_attn.k_proj, adapters.k_up), (block.self_attn.v_proj, adapters.v_up),
            )
        )  # fmt: skip
        scores = (torch.einsum("qhd,khd->hqk", q, k) / size**0.5).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", scores, v).flatten(1)
        out = block.self_attn.out_proj
        x = x + attended @ out.weight.T + out.bias + added(attended, adapters.output_down, adapters.output_up)
        norm = layer_norm(x, x.shape[-1:], block.layer_norm2.weight, block.layer_norm2.bias, config.layer_norm_eps)
        x = x + plain_mlp(block.mlp, norm) + added(x, adapters.mlp_down, adapters.mlp_up)
    return x


def plain_mlp(mlp, x: torch.Tensor) -> torch.Tensor:
    inner = x @ mlp.fc1.weight.T + mlp.fc1.bias
    return (inner * torch.sigmoid(1.702 * inner)) @ mlp.fc2.weight.T + mlp.fc2.bias


def test_every_window_meets_its_own_adapters_and_an_overview_none(case, tmp_path):
    """Written out for each square, in the platform's packed forward and the class's own; packed equals alone; the export."""
    model = model_of(case)
    family = family_of_model(model)
    samples = [conversation(1, [(90, 60)]), conversation(2, []), conversation(3, [(40, 130), (50, 50)])]
    use_attention(model, "sdpa_segments")
    with torch.no_grad():
        examples = [pack_of(case, [sample]) for sample in samples]
        alone = [pack_hidden(model, to_device(example, "cpu", torch.float32)) for example in examples]
        packed = pack_hidden(model, to_device(pack_of(case, samples), "cpu", torch.float32))
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
        example = examples[2]
        assert (example.image_rows.tolist(), example.image_tokens.tolist()) == ([7, 7], [63, 63])
        pixels = family.normalised(torch.from_numpy(example.pixels), torch.float32).view(14, 3, 56, 56)
        towers = torch.stack([written_out(model.model.vision_tower, one, None if n % 7 == 6 else n % 7) for n, one in enumerate(pixels)])
        expected = model.model.multi_modal_projector(towers[:, 1:], 4, 4)
        torch.testing.assert_close(torch.stack(model.model.get_image_features(pixels).pooler_output), expected, rtol=1e-4, atol=1e-4)
        plain = torch.stack([written_out(model.model.vision_tower, one, None) for one in pixels])
        assert float((plain - towers)[:6].abs().max()) > 0.1  # the adapters do something
        assert torch.equal(plain[6], towers[6])
        use_attention(model, "sdpa")
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids, pixel_values=pixels).logits[0]
        torch.testing.assert_close(logits, model.lm_head(alone[2]), rtol=1e-4, atol=1e-4)
        state = {name: parameter.detach() for name, parameter in model.named_parameters()}
        final = export_hf(state, case.config, case.tokenizer.directory, tmp_path / "final", pixels=case.pixels)
        loaded = AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float32).eval()
        data = picture(40, 130, seed=3)
        given = AutoImageProcessor.from_pretrained(final, trust_remote_code=True)(
            [Image.open(io.BytesIO(data)), Image.open(io.BytesIO(picture(50, 50, seed=3)))], return_tensors="pt"
        )["pixel_values"]
        assert float((given - pixels).abs().mean()) < 0.02
        torch.testing.assert_close(loaded(input_ids=ids, pixel_values=pixels).logits[0], logits, rtol=1e-5, atol=1e-5)


def test_adapters_begin_at_nothing_belong_to_vision_and_are_counted(case, tmp_path):
    model = build_model(case.section, case.config)
    other = adapted_case("window_adapters", tmp_path, window_adapters=None)
    plain = build_model(other.section, other.config)
    shape = shape_of_config(case.config.to_dict(), "terrace_vlm")
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(model).items()}
    assert parameter_counts(shape) == counted
    added = [name for name, _ in part_parameters(model)["vision"] if ".window_adapters." in name]
    parameters = dict(model.named_parameters())
    per_block = 6 * (3 * (32 + 96) + 3 * (32 + 32) + 5 * (32 + 32) + 3)  # six windows: q, k and v; output; beside the MLP; factors
    assert sum(parameters[name].numel() for name in added) == 2 * per_block
    assert part_sizes(shape)["vision"].block == sum(p.numel() for p in model.model.vision_tower.encoder.layers[0].parameters())
    use_attention(model, "sdpa_segments")
    use_attention(plain, "sdpa_segments")
    for sizes in ([(90, 60)], []):
        batch = to_device(pack_of(case, [conversation(3, sizes)]), "cpu", torch.float32)
        torch.testing.assert_close(summed_loss(model, batch, 64), summed_loss(plain, batch, 64), rtol=1e-6, atol=1e-6)
    model.zero_grad()
    summed_loss(model, to_device(pack_of(case, [conversation(3, [])]), "cpu", torch.float32), 64).backward()
    assert all(parameters[name].grad is not None for name in added)  # text alone: zeros, the same on every rank


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"window_grid": None}, "window_grid: must be [rows, columns] of windows"),
        ({"window_grid": [1, 1]}, "of one window is a square"),
        ({"image_layout": "tiles"}, "means nothing under image_layout tiles"),
        ({"image_layout": "tiles", "window_grid": None}, "window_adapters: needs image_layout: windows, not tiles"),
        ({"window_adapters": {"rank": 4}}, "window_adapters: must be a map of attention_rank, mlp_rank"),
        ({"window_adapters": WINDOW_RANKS | {"mlp_rank": 0}}, "window_adapters.mlp_rank: must be a whole number above 0, not 0"),
    ],
)
def test_mistakes_are_named(changes, told):
    with pytest.raises(RecipeError, match=re.escape(told)):
        parse_recipe({
            "name": "r", "model": {"architecture": "terrace_vlm", "config": CONFIG | changes}, "tokenizer": {"train_vocabulary_size": 400},
            "data": {"sources": {"a": {"uri": "x"}}},
            "stages": [{"name": "s", "train": {"projector": {"lr": 1e-3}}, "mixture": {"a": 1.0}, "budget": {"steps": 1}}],
        }, "r")  # fmt: skip
