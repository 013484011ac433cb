"""Greedy answers equal transformers' own generation on an exported model directory."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from packs import reference_images
from single_answers import answer, load_speaker

from terrace.data.images import image_size
from terrace.data.prompt import read_prompt
from terrace.data.tokenizer import train_tokenizer
from terrace.data.types import Sample
from terrace.demo import scenes
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.recipe.schema import Model

FAMILY = Qwen25VL()

PIXELS = (3136, 7056)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["How many circles are in the picture? a red circle"] * 3, 320, folder / "tokenizer", FAMILY)
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

    family, marks = speaker.sight.family, speaker.tokenizer.marks(speaker.sight.family)
    sizes = [image_size(data) for data in files]
    read = read_prompt(prompt, files, sizes, speaker.tokenizer, family, speaker.sight.pixels).inputs
    ids = torch.from_numpy(read.input_ids.astype(np.int64))[None]
    pictures = reference_images(read)
    if images:
        pictures["mm_token_type_ids"] = (ids == marks["image"]).int()
    ends = [marks["end_of_turn"], marks["end_of_text"]]
    never = [marks[role] for role in family.never]
    generated = speaker.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, suppress_tokens=never,
        eos_token_id=ends, pad_token_id=marks["end_of_text"], **pictures,
    )  # fmt: skip
    expected = [int(token) for token in generated[0, ids.shape[1] :]]
    if expected and expected[-1] in ends:
        expected.pop()
    assert said.token_ids == expected
    assert len(set(said.token_ids)) > 2  # a constant answer would agree with anything
