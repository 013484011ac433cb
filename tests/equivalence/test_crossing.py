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

from terrace.errors import InputError
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, meta_model
from terrace.models.families.crossing import last_pictures, runs_of
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
