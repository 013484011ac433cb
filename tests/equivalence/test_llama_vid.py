"""LLaMA-VID: its two kinds of tokens written out, questions and videos on their way to them, weights of InstructBLIP, an export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import CONFIGS, Case, case_of, conversation, model_of, pack_of, picture
from torch.nn.functional import gelu, layer_norm
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from terrace.data.prompt import read_prompt
from terrace.data.stream.collate import LoadedSample
from terrace.data.template import encode_sample
from terrace.data.types import Sample
from terrace.families.llama_vid import MOST_QUESTION_TOKENS
from terrace.models.attention import use_attention
from terrace.models.batch import image_facts, to_device
from terrace.models.build import build_model
from terrace.models.families.registry import family_of_model
from terrace.models.forward import pack_hidden
from terrace.models.parts import part_parameters
from terrace.recipe.errors import RecipeError
from terrace.recipe.loading import parse_recipe
from terrace.recipe.schema import Model


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    torch.set_num_threads(1)
    return case_of("llama_vid", tmp_path_factory.mktemp("tokenizers"))


def attended(own: torch.nn.Module, hidden: torch.Tensor, other: torch.Tensor, config) -> torch.Tensor:
    """BERT's attention of [T, D] over [S, any], the sum with what came in, and the norm behind it."""
    inner, heads = own.attention, config.num_attention_heads
    q, k, v = ((x @ one.weight.T + one.bias).view(len(x), heads, -1) for x, one in (
        (hidden, inner.query), (other, inner.key), (other, inner.value),
    ))  # fmt: skip
    scores = (torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ own.output.dense.weight.T + own.output.dense.bias
    return norm(out + hidden, own.output.LayerNorm)


def norm(x: torch.Tensor, module: torch.nn.LayerNorm) -> torch.Tensor:
    return layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def queries_of(connector, normed: torch.Tensor, question: list[int]) -> torch.Tensor:
    """The Q-Former with a question, layer by layer: [Q, D]."""
    former, count = connector.q_former, connector.query.shape[1]
    words = former.embeddings.word_embeddings.weight[question] + former.embeddings.position_embeddings.weight[: len(question)]
    hidden = norm(torch.cat([connector.query[0], words]), former.embeddings.layernorm)
    for layer in former.encoder.layer:
        hidden = attended(layer.attention, hidden, hidden, former.config)
        asked, words = hidden[:count], hidden[count:]
        if layer.has_cross_attention:
            asked = attended(layer.crossattention, asked, normed, former.config)
        rows = []
        for x, up, down in ((asked, layer.intermediate_query, layer.output_query), (words, layer.intermediate, layer.output)):
            inner = gelu(x @ up.dense.weight.T + up.dense.bias)
            rows.append(norm(inner @ down.dense.weight.T + down.dense.bias + x, down.LayerNorm))
        hidden = torch.cat(rows)
    return hidden[:count]


def written_out(model, pixels: torch.Tensor, question: list[int]) -> torch.Tensor:
    """E = Mean(Softmax(Q X') X) with projections, then the patches averaged over the cells of a grid: [1 + c * c, H]."""
    connector, tower = model.model.multi_modal_projector, model.model.vision_tower
    hidden = tower.embeddings(pixels[None])
    for block in tower.encoder.layers:
        hidden = block(hidden)
    [hidden] = hidden
    asked = queries_of(connector, norm(hidden, tower.post_layernorm), question) @ connector.text_proj.weight.T + connector.text_proj.bias
    patches = hidden[1:]
    keys = patches @ connector.key_proj.weight.T + connector.key_proj.bias
    found = torch.stack([((keys @ one) / patches.shape[1] ** 0.5).softmax(0) @ patches for one in asked])
    tokens = [connector.value_proj(found.mean(0))]
    across, side = round(len(patches) ** 0.5), connector.content_side
    grid, cell = patches.view(across, across, -1), across // side
    for row in range(side):
        for column in range(side):
            mean = grid[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell].reshape(cell * cell, -1).mean(0)
            tokens.append(connector.linear_2(gelu(connector.linear_1(mean))))
    return torch.stack(tokens)


def video(number: int, frames: int) -> LoadedSample:
    """A question about a video, one frame a second."""
    ask = [{"type": "video", "frames": list(range(frames)), "timestamps": [float(second) for second in range(frames)]}]
    ask += [{"type": "text", "text": "A red circle and"}]
    messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": [{"type": "text", "text": "3 blue squares"}]}]
    sizes = [(60, 90)] * frames
    return LoadedSample(Sample(f"v{number}", "video", messages), [picture(60, 90, seed=number + k) for k in range(frames)], sizes)


def test_pictures_and_frames_become_what_the_paper_s_formula_gives(case):
    """Two tokens' kinds for each picture, read for its own sample's question; each frame of a video for the video's."""
    model = model_of(case)
    family = family_of_model(model)
    samples = [conversation(1, [(90, 60), (50, 50)]), video(5, 3), conversation(2, [])]
    example = pack_of(case, samples)
    assert example.image_tokens.tolist() == [5, 5, 15]
    assert example.image_rows.tolist() == [1, 1, 3]
    assert example.image_facts[:, 0].tolist() == [1, 1, 3]
    ids = case.tokenizer.encode_question
    questions = [ids("How many circles?" * 2), ids("How many circles?" * 2), ids("A red circle and")]
    assert [facts[2 : 2 + facts[1]].tolist() for facts in example.image_facts] == [list(one) for one in questions]
    with torch.no_grad():
        values = family.normalised(torch.from_numpy(example.pixels), torch.float32)
        found = family.features(model, values, image_facts(example)).pooled
        rows = values.view(-1, 3, 56, 56)
        pairs = zip(rows, [questions[0], questions[1], *[questions[2]] * 3])
        expected = torch.cat([written_out(model, pixels, list(question)) for pixels, question in pairs])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        other = written_out(model, rows[0], list(questions[2]))
        assert float((other[0] - found[0]).abs().max()) > 0.01  # the context token depends on the question,
        torch.testing.assert_close(other[1:], found[1:5], rtol=1e-4, atol=1e-4)  # the content tokens do not
        use_attention(model, "sdpa_segments")
        alone = [pack_hidden(model, to_device(pack_of(case, [sample]), "cpu", torch.float32)) for sample in samples]
        packed = pack_hidden(model, to_device(example, "cpu", torch.float32))
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_what_is_asked_is_the_first_turn_with_a_prompt_as_with_an_answer(case):
    family = case.family
    loaded = conversation(1, [(90, 60)])
    turns = [*loaded.sample.messages, {"role": "user", "content": [{"type": "text", "text": "And what else?"}]}]
    for messages in (loaded.sample.messages, [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *turns]):
        encoded = encode_sample(Sample("s", "qa", messages), loaded.sizes, case.tokenizer, family, case.pixels)
        [visual] = encoded.visuals
        assert case.tokenizer.decode(np.asarray(visual.facts[2 : 2 + visual.facts[1]])) == "How many circles?" * 2
    read = read_prompt(loaded.sample, loaded.images, loaded.sizes, case.tokenizer, family, case.pixels)
    assert read.inputs.image_facts[0].tolist() == list(visual.facts)
    words = [{"type": "image", "image": 0}, {"type": "text", "text": "A red circle."}]
    caption = Sample("c", "caption", [{"role": "text", "content": words}])
    [visual] = encode_sample(caption, loaded.sizes, case.tokenizer, family, case.pixels).visuals
    assert visual.facts[:2] == (1, 0)
    long = family.asked((1, 0), list(range(1, 400)))
    assert (len(long), long[1], long[2], long[3], long[-1]) == (2 + MOST_QUESTION_TOKENS, MOST_QUESTION_TOKENS, 1, 145, 399)


def test_tower_and_q_former_come_from_an_instructblip(case, tmp_path):
    """Their tensors are its own, with the norm that the Q-Former reads through; what makes tokens of them begins new."""
    torch.manual_seed(3)
    theirs = InstructBlipForConditionalGeneration(InstructBlipConfig(**CONFIGS["instructblip"]))
    with torch.no_grad():
        theirs.query_tokens.normal_()
    theirs.save_pretrained(tmp_path / "instructblip")
    init = dict.fromkeys(("vision", "projector"), str(tmp_path / "instructblip"))
    section = Model.model_validate({**case.section.model_dump(), "init": init})
    model = build_model(section, case.config)
    own = {name: parameter for pairs in part_parameters(model).values() for name, parameter in pairs}
    for name, parameter in theirs.named_parameters():
        for published, here in (("vision_model.", "model.vision_tower."), ("qformer.", "model.multi_modal_projector.q_former."),
                                ("query_tokens", "model.multi_modal_projector.query")):  # fmt: skip
            if name.startswith(published):
                assert torch.equal(own.pop(here + name.removeprefix(published)), parameter), name
    left = {name for name in own if not name.startswith(("model.language_model.", "lm_head."))}
    assert left == {
        f"model.multi_modal_projector.{layer}.{kind}"
        for layer in ("text_proj", "key_proj", "value_proj", "linear_1", "linear_2") for kind in ("weight", "bias")
    }  # fmt: skip
    assert "model.vision_tower.post_layernorm.weight" in dict(part_parameters(model)["projector"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"content_side": 3}, "content_side: 3 does not divide the 4 patches of a side"),
        ({"text_config": CONFIGS["llama_vid"]["text_config"] | {"model_type": "qwen2"}}, "text_config.model_type: must be llama"),
        ({"vision_config": CONFIGS["llama_vid"]["vision_config"] | {"image_size": 60}}, "60 is no multiple of patch_size 14"),
    ],
)
def test_mistakes_are_named(changes, told):
    with pytest.raises(RecipeError, match=told):
        parse_recipe({
            "name": "r", "model": {"architecture": "llama_vid", "config": CONFIGS["llama_vid"] | changes},
            "tokenizer": {"train_vocabulary_size": 400}, "data": {"sources": {"a": {"uri": "x"}}},
            "stages": [{"name": "s", "train": {"projector": {"lr": 1e-3}}, "mixture": {"a": 1.0}, "budget": {"steps": 1}}],
        }, "r")  # fmt: skip
