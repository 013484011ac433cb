"""Flamingo's videos: frames with embeddings of their times, read together; against the formula, alone and in packs, and from the export."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from families import CONFIGS, Case, case_of, conversation, model_of, pack_of, picture
from torch.nn.functional import layer_norm
from transformers import AutoModelForImageTextToText

from terrace.data.order.eligible import Sized, visual_ranges
from terrace.data.stream.collate import LoadedSample
from terrace.data.template import encode_sample, measure_sample
from terrace.data.types import Sample
from terrace.models.attention import use_attention
from terrace.models.batch import image_facts, to_device
from terrace.models.export import export_hf
from terrace.models.families.registry import family_of_model
from terrace.models.forward import pack_hidden
from terrace.recipe.errors import RecipeError
from terrace.recipe.loading import parse_recipe


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    torch.set_num_threads(1)
    return case_of("flamingo", tmp_path_factory.mktemp("tokenizers"))


def video(number: int, frames: int) -> LoadedSample:
    """A question about a video, one frame a second."""
    ask = [{"type": "video", "frames": list(range(frames)), "timestamps": [float(second) for second in range(frames)]}]
    ask += [{"type": "text", "text": "A red circle and"}]
    messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": [{"type": "text", "text": "3 blue squares"}]}]
    images = [picture(60, 90, seed=number + k) for k in range(frames)]
    return LoadedSample(Sample(f"v{number}", "video", messages), images, [(60, 90)] * frames)


def times(table: torch.Tensor, frames: int) -> torch.Tensor:
    """The first embeddings, or, of more frames than there are, the line between the two nearest."""
    if frames <= len(table):
        return table[:frames]
    rows = []
    for frame in range(frames):
        place = frame * (len(table) - 1) / (frames - 1)
        before = min(int(place), len(table) - 2)
        rows.append(table[before] * (1 - (place - before)) + table[before + 1] * (place - before))
    return torch.stack(rows)


def latents_of(resampler, seen: torch.Tensor) -> torch.Tensor:
    """The paper's resampler over the frames [T, P, W] of one video: time embeddings, then all frames in a row beside the latents."""
    x = (seen + times(resampler.times, len(seen))[:, None]).flatten(0, 1)
    out = resampler.latents

    def norm(x, layer):
        return layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)

    for attention, feed in resampler.blocks:
        query = norm(out, attention.latents_layer_norm)
        both = torch.cat([norm(x, attention.context_layer_norm), query])
        projected = (query @ attention.q_proj.weight.T, both @ attention.k_proj.weight.T, both @ attention.v_proj.weight.T)
        q, k, v = (tensor.view(len(tensor), attention.n_heads, -1) for tensor in projected)
        weights = (torch.einsum("qhd,khd->hqk", q, k) * attention.head_dim**-0.5).softmax(-1)
        out = out + torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ attention.output_proj.weight.T
        out = out + torch.relu(norm(out, feed.ln) @ feed.fc.weight.T) @ feed.c_proj.weight.T
    return norm(out, resampler.layer_norm)


@torch.no_grad()
def test_frames_of_a_video_are_read_together_each_with_its_time(case):
    """Pictures and videos of one to six frames in one pack, four of which have embeddings: latents, order, packed and alone."""
    model = model_of(case)
    use_attention(model, "sdpa_segments")
    samples = [video(1, 3), conversation(2, [(90, 60)]), conversation(3, []), video(4, 6), video(5, 4)]
    example = pack_of(case, samples)
    facts = image_facts(example)
    assert facts.facts[:, 0].tolist() == facts.rows.tolist() == [3, 1, 6, 4]
    assert example.image_tokens.tolist() == [1, 1, 1, 1]
    family = family_of_model(model)
    pixels = family.normalised(torch.from_numpy(example.pixels), torch.float32)
    seen = model.model.vision_model(pixel_values=pixels.view(-1, 3, 56, 56)).last_hidden_state
    expected = torch.stack([latents_of(model.model.perceiver_resampler, one) for one in seen.split([3, 1, 6, 4])])
    given = family.features(model, pixels, facts).pooled
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    turned = latents_of(model.model.perceiver_resampler, seen[:3].flip(0))
    assert float((turned - expected[0]).abs().max()) > 0.01  # which frame comes first is seen
    packed = pack_hidden(model, to_device(example, "cpu", torch.float32))
    alone = torch.cat([pack_hidden(model, to_device(pack_of(case, [sample]), "cpu", torch.float32)) for sample in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_a_video_is_one_placeholder_and_counts_the_rows_of_its_frames(case):
    sample = video(1, 5)
    encoded = encode_sample(sample.sample, sample.sizes, case.tokenizer, case.family, case.pixels)
    measure = measure_sample(sample.sample, sample.sizes, case.tokenizer, case.family)
    assert (encoded.input_ids == case.tokenizer.marks(case.family)["image"]).sum() == 1
    assert measure.length(sample.sizes, case.pixels, case.family) == len(encoded.input_ids)
    [found] = visual_ranges(measure, Sized(sample.sizes, case.family), case.pixels)
    assert (found.tokens, found.rows) == (1, 5)


def test_an_export_reads_a_video_as_training_does(case, tmp_path):
    model = model_of(case, 0.05)
    use_attention(model, "sdpa_segments")
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    final = export_hf(state, case.config, case.tokenizer.directory, tmp_path / "final", pixels=case.pixels)
    assert {path.name for path in final.glob("*.py")} == {
        "configuration_flamingo.py", "modeling_flamingo.py", "padded_pictures.py", "timed_resampler.py"
    }  # fmt: skip
    loaded, told = AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    example = pack_of(case, [video(1, 3)])
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        ours = model.lm_head(pack_hidden(model, to_device(example, "cpu", torch.float32)))
        pixels = family_of_model(model).normalised(torch.from_numpy(example.pixels), torch.float32).view(-1, 3, 56, 56)
        seen = loaded.eval().model.vision_model(pixel_values=pixels).last_hidden_state
        latents = loaded.model.perceiver_resampler(seen, [3])
        shown = (torch.cumsum(ids == case.config.image_token_id, dim=1) == 1).long()[..., None]
        theirs = loaded(input_ids=ids, perceiver_embeddings=latents[None], image_attention_mask=shown).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_wrong_number_of_times_is_named():
    with pytest.raises(RecipeError, match=re.escape("video_frames: must be a number of times with an embedding")):
        parse_recipe({
            "name": "r", "model": {"architecture": "flamingo", "config": CONFIGS["flamingo"] | {"video_frames": 0}},
            "tokenizer": {"train_vocabulary_size": 400}, "data": {"sources": {"a": {"uri": "x"}}},
            "stages": [{"name": "s", "train": {"projector": {"lr": 1e-3}}, "mixture": {"a": 1.0}, "budget": {"steps": 1}}],
        }, "r")  # fmt: skip
