"""Marks, line ends and numbers that stand among the placeholders of an image: against the published processors' own text, and as places."""

from __future__ import annotations

import importlib
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from families import NAMES, case_of, conversation, recipe_model
from tokenizers import Tokenizer

from terrace.data.index.source_index import _image_costs
from terrace.data.order.eligible import Sized, visual_ranges
from terrace.data.template import encode_prompt, encode_sample, measure_sample
from terrace.data.tokenizer import train_tokenizer
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.families.registry import family_values, make_family, stored_family
from terrace.planner.flops import assumed_load, exact_load
from terrace.recipe.rules import check
from terrace.recipe.schema import Recipe

SIZES = [(20, 20), (150, 60), (61, 190), (200, 200), (33, 147), (700, 520), (90, 900), (640, 80), (57, 55), (113, 112)]
WRITERS = {  # family -> module and class of the processor whose text stands for an image
    "minicpmv4_6": ("minicpmv4_6.processing_minicpmv4_6", "MiniCPMV4_6Processor"),
    "smolvlm": ("smolvlm.processing_smolvlm", "SmolVLMProcessor"),
    "idefics3": ("idefics3.processing_idefics3", "Idefics3Processor"), "fuyu": ("fuyu.processing_fuyu", "FuyuProcessor"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


def published_text(name, family, view):
    """What the processor writes for an image of this view, its number in front where it has one."""
    module, kind = WRITERS[name]
    writer = getattr(importlib.import_module(f"transformers.models.{module}"), kind)
    marks, facts = family.marks, view.facts
    if name == "fuyu":
        mine = SimpleNamespace(image_token=marks["image"], image_newline_token=marks["row_end"])
        return writer.replace_image_token(mine, {}, 0, num_patches=facts[0] * facts[1], row_width=facts[1]).removesuffix("<s>")
    if name == "minicpmv4_6":
        mine = SimpleNamespace(slice_mode=True, **{attribute: marks[role] for attribute, role in family.token_names.items()})
        sizes = np.asarray([facts[2:4], *[facts[4:6]] * (facts[0] * facts[1])])
        inputs = {"grids": [facts[:2]], "num_patches_per_image": [len(sizes)], "target_sizes": sizes}
        return writer.replace_image_token(mine, inputs, 0, image_token_divisor=16)
    tokens = {"fake_image_token": marks["around_image"], "image_token": marks["image"], "image_seq_len": family.tokens}
    tokens |= {"global_image_token": marks["global_image"], "global_image_tag": marks["global_image"]}
    return writer.replace_image_token(SimpleNamespace(**tokens), {"rows": [[facts[0]]], "cols": [[facts[1]]]}, 0)


@pytest.mark.parametrize("name", WRITERS)
def test_an_image_reads_as_the_published_processor_writes_it(name, folder):
    case = case_of(name, folder)
    plain = Tokenizer.from_file(str(case.tokenizer.directory / "tokenizer.json"))
    marks = case.tokenizer.marks(case.family)
    grids = set()
    for size, pixels in itertools.product(SIZES, (case.pixels, (1, case.family.fewest_pixels))):
        sample = Sample("s", "qa", [{"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "What?"}]}])
        encoded = encode_prompt(sample, [size], case.tokenizer, case.family, pixels)
        [visual], [view] = encoded.visuals, encoded.views
        expected = plain.encode(published_text(name, case.family, view), add_special_tokens=False).ids
        assert encoded.input_ids[visual.start : visual.start + visual.length].tolist() == expected
        grids.add(view.facts)
        if name == "minicpmv4_6":  # `<image_id>0</image_id>` in front of the first
            assert case.tokenizer.decode(encoded.input_ids[visual.start - 3 : visual.start]) == "<image_id>0</image_id>"
            assert encoded.input_ids[visual.start - 3] == marks["image_id_start"]
    assert len(grids) > 4


@pytest.mark.parametrize("name", NAMES)
def test_ranges_hold_all_of_an_image_and_the_index_counts_as_the_text(name, folder):
    """Nothing of an image stands outside the range in which no document is split; costs of many are those of each."""
    case = case_of(name, folder)
    family, marks = case.family, case.tokenizer.marks(case.family)
    visual_marks = {marks[role] for role in marks if role.startswith(("image", "slice", "row", "around", "global", "vision"))}
    samples = [[SIZES[1]], SIZES[:2], SIZES[2:5], []]
    flat = [size for sizes in samples for size in sizes]
    columns = (np.asarray(column) for column in zip(*flat))
    costs = _image_costs(family, *columns, case.pixels, np.asarray([len(sizes) for sizes in samples]))
    start = 0
    for number, sizes in enumerate(samples):
        sample = conversation(number, sizes, drawn=False).sample
        encoded = encode_sample(sample, sizes, case.tokenizer, family, case.pixels)
        own = slice(start, start + len(sizes))
        assert costs.tokens[own].tolist() == [visual.tokens for visual in encoded.visuals]
        assert costs.lengths[own].tolist() == [visual.length for visual in encoded.visuals]
        start += len(sizes)
        measure = measure_sample(sample, sizes, case.tokenizer, family)
        ranges = visual_ranges(measure, Sized(sizes, family), case.pixels)
        assert [visual.start for visual in encoded.visuals] == [one.start + family.heading_tokens(n) for n, one in enumerate(ranges)]
        inside = np.zeros(len(encoded.input_ids), bool)
        for one in ranges:
            inside[one.start : one.stop] = True
        assert not set(encoded.input_ids[~inside].tolist()) & visual_marks
        assert sum(one.tokens for one in ranges) == (encoded.input_ids == marks["image"]).sum()


def test_two_line_ends_are_as_many_tokens_as_the_tokenizer_makes_of_them(folder):
    """One token or two: the family of the run counts them; one that was made for another tokenizer is refused by name."""
    plain = make_family("idefics3", recipe_model("idefics3")["config"])
    sizes = [(150, 60)]
    found = {}
    for name, text in (("split", "Words"), ("joined", "Words\n\nand\n\nmore.")):
        tokenizer = train_tokenizer([text] * 60, 400, folder / name, plain)
        family = tokenizer.fit(plain)
        found[name] = family.line_ends
        view = family.view(*sizes[0], (3_136, 168 * 168))
        encoded = encode_sample(conversation(1, sizes, drawn=False).sample, sizes, tokenizer, family, (3_136, 168 * 168))
        assert encoded.visuals[0].length == view.length
        with pytest.raises(InputError, match=r"writes '\\n\\n', which stands inside an image of idefics3, as . tokens where . are counted"):
            tokenizer.marks(replace(family, line_ends=3 - family.line_ends))
        assert stored_family({**family_values(family)}) == family
    assert found == {"split": 2, "joined": 1}


def test_a_language_model_that_cannot_be_packed_is_refused_wherever_it_comes_from():
    config = recipe_model("minicpmv4_6")["config"]
    with pytest.raises(InputError, match="minicpmv4_6 with a language model of type qwen3_5_text, whose attention cannot be packed here"):
        make_family("minicpmv4_6", {**config, "text_config": {**config["text_config"], "model_type": "qwen3_5_text"}})


def test_a_part_that_a_family_lacks_is_refused_by_name():
    values = {
        "name": "r", "model": recipe_model("fuyu"), "tokenizer": {"train_vocabulary_size": 400}, "data": {"sources": {"a": {"uri": "x"}}},
        "stages": [{"name": "s", "train": {"vision": {"lr": 1e-3}}, "mixture": {"weights": {"a": 1.0}}, "budget": {"steps": 1}}],
    }  # fmt: skip
    told = [str(problem) for problem in check(Recipe.model_validate(values))]
    assert any("train.vision: fuyu has no part vision; it has projector and language" in line for line in told)


def test_vllm_is_refused_where_pictures_cannot_be_given_back_whole():
    values = {
        "name": "r", "model": recipe_model("llava_next"), "tokenizer": {"train_vocabulary_size": 400},
        "data": {"sources": {"a": {"uri": "x", "kind": "prompt", "task": "t"}}},
        "stages": [{"name": "s", "objective": "grpo", "train": {"language": {"lr": 1e-3}}, "mixture": {"weights": {"a": 1.0}},
                    "budget": {"steps": 1}, "grpo": {"engine": "vllm"}, "rewards": {"t": [{"name": "exact"}]}}],
    }  # fmt: skip
    told = [str(problem) for problem in check(Recipe.model_validate(values))]
    assert any("grpo.engine: vllm cannot answer for llava_next" in line for line in told)
    values["model"] = recipe_model("mistral3")
    assert not any("grpo.engine" in str(problem) for problem in check(Recipe.model_validate(values)))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "idefics3", "internvl"])
def test_an_estimate_without_data_counts_attention_within_tiles(name, folder):
    case = case_of(name, folder)
    shape = case.family.shape(case.config.to_dict())
    view = case.family.view(900, 900, case.pixels)
    pictures = case.family.tower_pictures(view.facts)
    exact = exact_load(shape, [512], pictures, 1)
    assumed = assumed_load(shape, 512, exact.visual_tokens, 512, exact.visual_tokens)
    assert len(pictures) > 1
    assert assumed.pictures == pytest.approx(len(pictures))
    assert assumed.image_squares == pytest.approx(sum((rows * columns) ** 2 for rows, columns in pictures))


def test_canvases_survive_a_manifest():
    family = make_family("llava_onevision", recipe_model("llava_onevision")["config"])
    stored = stored_family(json.loads(json.dumps(family_values(family))))
    assert stored == family
    assert stored.view(300, 200, (1, 1)) == family.view(300, 200, (1, 1))
    assert stored.among(2).view(300, 200, (1, 1)).rows == 1
