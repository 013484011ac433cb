"""Pictures as tokens: what their placeholders stand for is read and learned, and the loss of large logits (z-loss)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import case_of, conversation, model_of, pack_of, picture

from terrace.data.stream.collate import LoadedSample
from terrace.data.tokenizer import train_tokenizer
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.families.chameleon import code_name
from terrace.families.registry import family_class
from terrace.models.attention import use_attention
from terrace.models.batch import image_facts, to_device
from terrace.models.build import model_config
from terrace.models.families.registry import family_of_model
from terrace.models.head import summed_cross_entropy
from terrace.objectives.lm import summed_loss
from terrace.recipe.schema import Model


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    torch.set_num_threads(1)
    return case_of("chameleon", tmp_path_factory.mktemp("fusion"))


def caption(number: int, size: tuple[int, int]) -> LoadedSample:
    content = [{"type": "image", "image": 0}, {"type": "text", "text": f"A red circle {number}"}]
    return LoadedSample(Sample(f"c{number}", "caption", [{"role": "text", "content": content}]), [picture(*size, seed=number)], [size])


def test_the_loss_of_a_pack_is_that_of_its_samples_with_codes_in_place_of_placeholders(case):
    model = model_of(case)
    family = family_of_model(model)
    use_attention(model, "sdpa_segments")
    image, samples = model.config.image_token_id, [caption(1, (60, 40)), conversation(2, [(50, 70)]), caption(3, (90, 40))]
    expected = torch.zeros(())
    for sample in samples:
        example = pack_of(case, [sample])
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        learned = int((example.targets == image).sum())
        assert learned == (0 if sample.sample.kind == "qa" else case.family.tokens)  # a question's picture is read alone
        with torch.no_grad():
            pixels = family.inputs(family.normalised(torch.from_numpy(example.pixels), torch.float32), image_facts(example))
            ids[ids == image] = model.get_image_tokens(**pixels).flatten().long()
            rows = example.targets >= 0
            hidden = model.model(input_ids=ids[None], **bounds(len(ids))).last_hidden_state[0]
            logits = hidden @ model.lm_head.weight.t()
            expected = expected + F.cross_entropy(logits[:-1][rows[:-1]], ids[1:][rows[:-1]], reduction="sum")
    batch = to_device(pack_of(case, samples), "cpu", torch.float32)
    with torch.no_grad():
        found = summed_loss(model, batch, 64)
        again = summed_loss(model, batch, 64)  # whose targets are codes already
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert float(found) == float(again)


def bounds(length: int) -> dict[str, object]:
    ends = torch.tensor([0, length], dtype=torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length, "use_cache": False}


@pytest.mark.parametrize("weight", [0.0, 1e-5, 0.3])
def test_the_z_loss_is_its_formula_and_so_are_its_gradients(weight):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 6, generator=generator, dtype=torch.float64).requires_grad_()
    matrix = torch.randn(11, 6, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 11, (9,), generator=generator)
    logits = hidden @ matrix.t()
    normaliser = logits.exp().sum(dim=1).log()
    written = (normaliser - logits[torch.arange(9), targets]).sum() + weight * (normaliser**2).sum()
    wanted = torch.autograd.grad(written, (hidden, matrix))
    found = summed_cross_entropy(hidden, matrix, targets, 4, weight)
    torch.testing.assert_close(found.double(), written, rtol=1e-6, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(found, (hidden, matrix)), wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_codes_are_the_tokenizer_s_own_or_stand_behind_its_vocabulary(case, tmp_path):
    rows, size = case.config.vocabulary_map, case.tokenizer.vocabulary_size
    assert [rows[code_name(code)] for code in (0, 31)] == [size, size + 31]
    assert code_name(8191) == "IMGIMGIBJBZ"
    family = family_class("chameleon")
    assert family.unsaid(case.config) == set(range(size, size + 32))
    codes = {code_name(code): code_name(code) for code in range(32)}
    with_codes = type("WithCodes", (family,), {"marks": {**family.marks, **codes}})
    tokenizer = train_tokenizer(["A red circle"] * 9, 300, tmp_path, with_codes)
    config = model_config(case.section, tokenizer)
    assert config.vocabulary_map[code_name(7)] == tokenizer.token_id(code_name(7))
    narrow = Model.model_validate({"architecture": "chameleon", "config": {**case.section.config, "vocab_size": size}})
    with pytest.raises(InputError, match=f"{size} has no room for 32 codes of pictures: {size + 32} are needed"):
        model_config(narrow, case.tokenizer)
