"""Pictures beside the sequence: whose picture a token sees, packed or not, and the published checkpoint's split matrices."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import case_of, conversation, model_of, pack_of
from safetensors.torch import save_file
from transformers.models.idefics.processing_idefics import image_attention_mask_for_packed_input_ids_pt
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from terrace.errors import InputError
from terrace.generation.tokens import forbidden_tokens
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, meta_model, model_config
from terrace.models.families.crossing import last_pictures, runs_of
from terrace.models.families.mllama import rows_of
from terrace.models.forward import pack_logits_hidden
from terrace.recipe.schema import Model

IMAGE = 7


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    torch.set_num_threads(1)
    return case_of("idefics", tmp_path_factory.mktemp("crossing"))


def test_a_token_sees_the_last_picture_before_it_in_its_own_sample():
    rng = np.random.default_rng(3)
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda token: IMAGE, eos_token_id=-5)
    for _ in range(50):
        samples = [rng.choice([1, 2, 3, IMAGE], int(rng.integers(1, 12)), p=[0.3, 0.3, 0.2, 0.2]) for _ in range(int(rng.integers(1, 5)))]
        packed, boundaries = np.concatenate(samples), np.cumsum([0, *map(len, samples)]).tolist()
        found, expected, before = last_pictures(packed, IMAGE, boundaries), [], 0
        for sample in samples:  # transformers' own rule, for each sample alone
            alone = image_attention_mask_for_packed_input_ids_pt(torch.from_numpy(sample)[None], tokenizer)[0][0].numpy()
            expected.append(np.where(alone >= 0, alone + before, -1))
            before += int((sample == IMAGE).sum())
        assert found.tolist() == np.concatenate(expected).tolist()
        runs = runs_of(found)
        assert [start for start, _, _ in runs][1:] == [end for _, end, _ in runs][:-1]
        assert np.concatenate([np.full(end - start, picture) for start, end, picture in runs]).tolist() == np.maximum(found, 0).tolist()


def test_only_tokens_behind_a_picture_in_its_sample_change_with_it(case):
    model = model_of(case)
    use_attention(model, "sdpa_segments")

    def logits(change: bool):
        samples = [conversation(1, [(60, 40), (50, 50)]), conversation(2, []), conversation(3, [(70, 60)])]
        if change:
            samples[0].images[1] = conversation(9, [(50, 50)]).images[0]
        example = pack_of(case, samples)
        with torch.no_grad():
            return example, pack_logits_hidden(model, to_device(example, "cpu", torch.float32))[0]

    example, before = logits(False)
    _, after = logits(True)
    moved = (before - after).abs().amax(dim=1) > 1e-6
    second = int(np.flatnonzero(example.input_ids == case.tokenizer.marks(case.family)["image"])[1])
    end = int(example.segment_ends[0])
    assert moved[second:end].all()
    assert not moved[:second].any()
    assert not moved[end:].any()


def test_a_published_checkpoint_s_added_rows_become_rows_of_one_matrix(case, tmp_path):
    state = {name: tensor.detach() for name, tensor in build_model(case.section, case.config).state_dict().items()}
    stored = dict(state)
    for name, added in (("model.embed_tokens", "additional_embedding"), ("lm_head", "additional_fc")):
        whole = stored.pop(f"{name}.weight")
        stored |= {f"{name}.weight": whole[:-2].clone(), f"{name}.{added}.weight": whole[-2:].clone()}
    save_file(stored, tmp_path / "model.safetensors")
    values = case.config.to_dict() | {"vocab_size": case.config.vocab_size - 2, "additional_vocab_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(values))
    section = Model.model_validate({
        "architecture": "idefics", "config": case.section.config,
        "init": {part: str(tmp_path) for part in ("vision", "projector", "language")},
    })  # fmt: skip
    loaded = build_model(section, case.config)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    split = type(case.config)(**values)
    with pytest.raises(InputError, match="additional_vocab_size must be 0 here: write `config`"):
        meta_model(split)


def test_mllama_s_tokens_see_what_the_published_mask_shows_them():
    """Pictures in a row are seen together; packed samples each by themselves; in front of the first picture a row of zeros."""
    rng = np.random.default_rng(4)
    for _ in range(60):
        samples = [rng.choice([1, 2, IMAGE], int(rng.integers(1, 12)), p=[0.3, 0.3, 0.4]) for _ in range(int(rng.integers(1, 5)))]
        packed, boundaries = np.concatenate(samples), np.cumsum([0, *map(len, samples)]).tolist()
        found = np.zeros((len(packed), int((packed == IMAGE).sum())), bool)
        covered, fronts = [], []
        for start, end, first, last, before in rows_of(packed, IMAGE, boundaries):
            covered += range(start, end)
            fronts += range(start, end) if before else []
            found[start:end, first:last] = not before
        assert covered == list(range(len(packed)))
        expected, before, front = np.zeros_like(found), 0, []
        for start, sample in zip(boundaries, samples):
            for place, (begin, end) in enumerate(get_cross_attention_token_mask(sample.tolist(), IMAGE), before):
                expected[start + begin : start + (len(sample) if end == -1 else end), place] = True
            before += int((sample == IMAGE).sum())
            front += [start + token for token in range(len(sample)) if IMAGE not in sample[: token + 1]]
        assert np.array_equal(found, expected)
        assert fronts == front


def test_a_placeholder_behind_the_vocabulary_is_read_and_never_sampled(tmp_path):
    """As Llama 3.2 Vision is published: the tokenizer's last token has a row of the embedding and none of the output layer."""
    case = case_of("mllama", tmp_path)
    model, config = model_of(case), case.config.get_text_config()
    model.config.image_token_index = config.vocab_size
    use_attention(model, "sdpa_segments")
    marks = {**case.tokenizer.marks(case.family), "image": config.vocab_size}
    told = {"marks": lambda family: marks, "fit": lambda family: family, "token_id": {}.get}
    tokenizer = SimpleNamespace(**told, vocabulary_size=config.vocab_size + 1)
    assert max(forbidden_tokens(tokenizer, case.config)) < config.vocab_size
    section = Model.model_validate({"architecture": "mllama", "config": {**case.section.config}})
    assert model_config(section, tokenizer).image_token_index == config.vocab_size
    example = pack_of(case, [conversation(1, [(60, 40)])])
    example.input_ids[example.input_ids == case.config.image_token_index] = config.vocab_size
    with torch.no_grad():
        logits, _ = pack_logits_hidden(model, to_device(example, "cpu", torch.float32))
    assert logits.shape[1] == config.vocab_size
    assert torch.isfinite(logits).all()
    with pytest.raises(InputError, match="raise it to at least the tokenizer's"):
        model_config(section, SimpleNamespace(**told, vocabulary_size=config.vocab_size + 9))
