"""Greedy answers equal transformers' own generation on an exported model directory."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from terrace.data.images import image_size
from terrace.data.template import encode_prompt
from terrace.data.tokenizer import train_tokenizer
from terrace.data.types import Sample
from terrace.demo import scenes
from terrace.evaluate.generate import answer, load_speaker
from terrace.models.batch import normalise_patches
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.recipe.schema import Model

PIXELS = (3136, 7056)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["How many circles are in the picture? a red circle"] * 3, 320, folder / "tokenizer")
    shape = {
        "text_config": {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "initializer_range": 0.3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
        },
    }  # fmt: skip
    model = Model.model_validate({"config": shape})
    config = model_config(model, tokenizer)
    built = build_model(model, config)
    state = {name: parameter.detach() for name, parameter in built.named_parameters()}
    return load_speaker(export_hf(state, config, tokenizer.directory, folder / "final", pixels=PIXELS))


def _files(count: int) -> list[bytes]:
    files = []
    for seed in range(count):
        buffer = io.BytesIO()
        scenes.draw_shapes(seed).picture.save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


@pytest.mark.parametrize("images", [0, 1, 2])
def test_greedy_tokens_equal_transformers_generate(speaker, images):
    files = _files(images)
    content = [*({"type": "image", "image": k} for k in range(images)), {"type": "text", "text": "How many circles?"}]
    prompt = Sample("p", "prompt", [{"role": "user", "content": content}])
    said = answer(speaker, prompt, files, max_new_tokens=24)

    special = speaker.tokenizer.special
    encoded = encode_prompt(prompt, [image_size(data) for data in files], speaker.tokenizer, speaker.pixels)
    ids = torch.from_numpy(encoded.input_ids.astype(np.int64))[None]
    pictures = {}
    if images:
        from terrace.data.images import load_patches

        patches = np.concatenate([load_patches(data, 84, 84) for data in files])
        pictures = {
            "pixel_values": normalise_patches(torch.from_numpy(patches), torch.float32),
            "image_grid_thw": torch.from_numpy(encoded.grids.astype(np.int64)),
            "mm_token_type_ids": (ids == special.image_pad).int(),
        }
    never = [special.im_start, special.vision_start, special.vision_end, special.image_pad, special.video_pad]
    generated = speaker.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, suppress_tokens=never,
        eos_token_id=[special.im_end, special.endoftext], pad_token_id=special.endoftext, **pictures,
    )  # fmt: skip
    expected = [int(token) for token in generated[0, ids.shape[1] :]]
    if expected and expected[-1] in (special.im_end, special.endoftext):
        expected.pop()
    assert said.token_ids == expected
    assert len(set(said.token_ids)) > 2  # a constant answer would agree with anything
