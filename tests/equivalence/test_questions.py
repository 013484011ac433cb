"""A Q-Former that reads the question: whose words, in whose vocabulary, and what the exported processor makes of the same."""

from __future__ import annotations

import shutil

import pytest
import torch
from families import case_of, conversation, model_of, pack_of
from transformers import AutoProcessor

from terrace.data.template import encode_sample
from terrace.data.tokenizer import QUESTION_TOKENIZER, load_tokenizer
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.families.instructblip import MOST_QUESTION_TOKENS
from terrace.models.batch import image_facts, to_device
from terrace.models.export import export_hf
from terrace.models.families.registry import family_of_model


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    torch.set_num_threads(1)
    return case_of("instructblip", tmp_path_factory.mktemp("questions"))


def question_of(case, words, answer="3"):
    content = [{"type": "image", "image": 0}, *([{"type": "text", "text": words}] if words else [])]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    encoded = encode_sample(Sample("s", "qa", said), [(60, 40)], case.tokenizer, case.family, case.pixels)
    return encoded.facts[0, 2 : 2 + encoded.facts[0, 1]].tolist()


def test_the_question_alone_travels_with_its_pictures(case):
    assert question_of(case, "How many circles?") == case.tokenizer.encode("How many circles?")
    assert question_of(case, "How many circles?", "A red circle") == case.tokenizer.encode("How many circles?")
    assert question_of(case, "") == []
    caption = Sample("c", "caption", [{"role": "text", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "A circle"}]}])
    assert encode_sample(caption, [(60, 40)], case.tokenizer, case.family, case.pixels).facts[0, :2].tolist() == [1, 0]
    long = question_of(case, "How many circles? " * 60 + "3")
    assert len(long) == MOST_QUESTION_TOKENS
    assert long[-1] == case.tokenizer.encode("3")[0]
    with pytest.raises(InputError, match="a vocabulary of 30: put its own tokenizer in the folder `qformer_tokenizer`"):
        type(case.family)(vocabulary=30).asked((1,), [29, 30])


def test_another_question_gives_other_features_and_padding_none(case):
    model = model_of(case)
    family = family_of_model(model)

    def features(*samples):
        batch = to_device(pack_of(case, samples), "cpu", torch.float32)
        with torch.no_grad():
            return family.features(model, family.normalised(batch.pixels, torch.float32), image_facts(batch.example)).pooled

    short, long = conversation(3, [(60, 40)]), conversation(5, [(60, 40)])  # of one and of three questions
    long.images[:] = short.images
    alone, other = features(short), features(long)
    assert float((alone - other).abs().max()) > 0.01 * float(alone.abs().max())
    torch.testing.assert_close(features(short, long), torch.cat([alone, other]), rtol=1e-5, atol=1e-5)


def test_its_own_tokenizer_is_read_exported_and_that_of_the_published_processor(case, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(case.tokenizer.directory, own)
    words = load_tokenizer(case_of("llava", tmp_path).tokenizer.directory)
    shutil.copytree(words.directory, own / QUESTION_TOKENIZER)
    tokenizer = load_tokenizer(own)
    assert tokenizer.encode_question("A red circle") == words.encode("A red circle") != tokenizer.encode("A red circle")
    model = model_of(case)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for directory, expected in ((own, words), (case.tokenizer.directory, case.tokenizer)):
        final = export_hf(state, case.config, directory, tmp_path / "final", pixels=case.pixels)
        processor = AutoProcessor.from_pretrained(final)
        assert processor(text="A red circle")["qformer_input_ids"][0] == expected.encode("A red circle")
