"""The family contract: what every family must hold, on tiny models and random samples. One module for all of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import (
    CONFIGS,
    NAMES,
    QUICK,
    TILED,
    case_of,
    conversation,
    model_of,
    pack_of,
    picture,
    random_samples,
    recipe_model,
    reference_inputs,
)
from measured import activations, flops, trainable
from middle_families import middle_case
from pixel_references import NEEDS_TORCHVISION
from published_pixels import published_pixels
from thread_ranks import run_threads
from transformers import AutoModelForImageTextToText

from terrace.data.images import image_size, load_pixels
from terrace.data.template import encode_prompt, encode_sample, measure_sample
from terrace.data.types import Sample
from terrace.families.configurations import language_config
from terrace.families.one_tile import OneTile
from terrace.families.registry import built_in, family_class
from terrace.generation.engines import forbidden_tokens, stop_tokens
from terrace.generation.native import NativeEngine
from terrace.models.attention import use_attention
from terrace.models.batch import image_facts, to_device
from terrace.models.build import build_model, meta_model
from terrace.models.export import export_hf
from terrace.models.families.registry import family_of_model
from terrace.models.forward import hidden_states, pack_hidden, pack_logits_hidden
from terrace.models.parts import part_parameters
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.objectives.lm import summed_loss
from terrace.planner.parameters import parameter_counts, part_sizes
from terrace.planner.shapes import shape_of_config
from terrace.recipe.schema import PARTS

ONE_QUESTION = ("paligemma", "blip_2", "instructblip")  # families whose conversations have one turn of each
CHEAP = (
    "test_every_family_is_checked_here",
    "test_length_by_arithmetic_is_what_is_written_and_what_the_model_gives",
    "test_pixels_are_those_of_the_published_processor",
    "test_packed_equals_alone_and_a_leak_would_show",
    "test_one_sample_equals_the_class_s_own_forward",
    "test_parts_are_complete_and_disjoint_and_freezing_holds",
    "test_a_text_only_pack_gives_every_trained_tensor_a_gradient",
    "test_the_planner_counts_what_the_class_has",
    "test_the_export_s_image_processor_and_tokenizer_need_nothing_of_terrace",
    "test_a_recipe_of_the_family_validates_and_its_mistakes_are_named",
)
STRETCHED = tuple(name for name in NAMES if issubclass(family_class(name), OneTile))
# Families whose resize is not bicubic, or does not keep the aspect.
DISTORTING = ("internvl", "minicpmv4_6", "terrace_vlm_any_size", "mistral3", "fuyu", "mllama", *TILED, *STRETCHED)
WHOLE_PROCESSORS = ("llava", "llava_next", "idefics3")  # that can be made without torchvision


def pytest_generate_tests(metafunc):
    """Every test for every family; what is dear is in `make test` for some families alone."""
    dear = metafunc.function.__name__ not in CHEAP
    metafunc.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow) if dear and name not in QUICK else name for name in NAMES]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture
def case(name, folder):
    return case_of(name, folder)


def seen(case, logits):
    """Logits without those that transformers' class overwrites, of tokens that an answer never has."""
    unsaid = case.family.unsaid(case.config)
    return logits[:, [token for token in range(logits.shape[1]) if token not in unsaid]]


def test_every_family_is_checked_here(name):
    assert {family for family in built_in() if family_class(family).gives == "text"} == set(NAMES)


def test_length_by_arithmetic_is_what_is_written_and_what_the_model_gives(case):
    """200 random pictures: the index's columns, the single view, the tokens of the text and the model's features agree."""
    rng = np.random.default_rng(5)
    sizes = [(int(w), int(h)) for w, h in np.exp(rng.uniform(np.log(20), np.log(900), (200, 2))) if max(w, h) <= 12 * min(w, h)]
    while len(sizes) < 200:
        sizes.append((int(rng.integers(20, 300)), int(rng.integers(20, 300))))
    costs = case.family.costs(*(np.asarray(column) for column in zip(*sizes)), case.pixels)
    views = [case.family.view(*size, case.pixels) for size in sizes]
    assert costs.tokens.tolist() == [view.tokens for view in views]
    assert costs.rows.tolist() == [view.rows for view in views]
    assert list(zip(costs.scale_heights.tolist(), costs.scale_widths.tolist())) == [view.scale for view in views]
    for number, size in enumerate(sizes):
        sample = conversation(number % 10, [size], drawn=False).sample
        encoded = encode_sample(sample, [size], case.tokenizer, case.family, case.pixels)
        measure = measure_sample(sample, [size], case.tokenizer, case.family)
        assert measure.length([size], case.pixels, case.family) == len(encoded.input_ids)
        assert (encoded.input_ids == case.tokenizer.marks(case.family)["image"]).sum() == views[number].tokens
    model = model_of(case)
    family = family_of_model(model)
    for start in range(0, 200 if case.name in QUICK else 40, 40):
        some = [conversation(1, [size]) for size in sizes[start : start + 40]]
        rows = [load_pixels(sample.images[0], case.family, view) for sample, view in zip(some, views[start : start + 40])]
        assert [len(part) for part in rows] == [view.rows for view in views[start : start + 40]]
        for part, view in zip(rows, views[start : start + 40]):  # what `terrace inspect` shows of them
            assert np.prod(case.family.token_grid(view.facts)) == view.tokens
            shown = case.family.pictures_of(part, view.facts)
            assert shown.ndim == 4
            assert np.array_equal(np.sort(shown.ravel()), np.sort(part.ravel()[: shown.size]))
        example = pack_of(case, some)
        with torch.no_grad():
            values = family.normalised(torch.from_numpy(np.concatenate(rows)), torch.float32)
            features = family.features(model, values, image_facts(example))
        assert len(features.pooled) == sum(view.tokens for view in views[start : start + 40])


@pytest.mark.parametrize("size", [(150, 60), (61, 190), (200, 200), (33, 47), (700, 520)])
def test_pixels_are_those_of_the_published_processor(case, size):
    data = picture(*size)
    ours = load_pixels(data, case.family, case.family.view(*image_size(data), case.pixels))
    theirs = published_pixels(case, data)
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    if case.name in DISTORTING:  # torch's kernel and Pillow's differ by more on noise
        assert (difference > 2).mean() < 0.02
        assert difference.mean() < 0.5
        return
    assert difference.max() <= 2  # torch's kernel against Pillow's
    assert difference.mean() < 0.1


def test_packed_equals_alone_and_a_leak_would_show(case):
    model = model_of(case)
    use_attention(model, "sdpa_segments")
    samples = random_samples(6, seed=2)
    assert any(not sample.images for sample in samples)
    alone = []
    with torch.no_grad():
        for sample in samples:
            alone.append(pack_logits_hidden(model, to_device(pack_of(case, [sample]), "cpu", torch.float32))[0])
        packed, _ = pack_logits_hidden(model, to_device(pack_of(case, samples), "cpu", torch.float32))
        together = pack_of(case, samples)
        together.segment_ends = together.segment_ends[-1:]  # the control: one segment
        leaking, _ = pack_logits_hidden(model, to_device(together, "cpu", torch.float32))
    scale = float(torch.cat(alone).abs().max())
    rounding = 3e-6 if case.family.crosses else 1e-6  # twice the layers
    assert float((packed - torch.cat(alone)).abs().max()) <= rounding * max(1.0, scale)
    assert float((leaking - torch.cat(alone)).abs().max()) > 0.01 * scale


def test_one_sample_equals_the_class_s_own_forward(case):
    model = model_of(case)
    reference = AutoModelForImageTextToText.from_config(case.config, dtype=torch.float32, attn_implementation="sdpa").eval()
    reference.load_state_dict(model.state_dict())
    use_attention(model, "sdpa_segments")
    for sample in random_samples(4, seed=3):
        example = pack_of(case, [sample])
        with torch.no_grad():
            ours, _ = pack_logits_hidden(model, to_device(example, "cpu", torch.float32))
            theirs = reference(**reference_inputs(case, example, reference), use_cache=False).logits[0]
        ours, theirs = seen(case, ours), seen(case, theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_parts_are_complete_and_disjoint_and_freezing_holds(case):
    model = meta_model(case.config)
    parts = part_parameters(model)
    names = [name for part in PARTS for name, _ in parts[part]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert tuple(part for part in PARTS if parts[part]) == case.family.parts
    family = family_of_model(model)
    for part in ("vision", "language"):
        blocks = family.blocks_of(model, part)
        numbers = {family.block_number(name) for name, _ in parts[part]} - {None}
        assert numbers == set(range(len(blocks)))
    assert set(family.unused(case.config, names)) <= set(names)


def test_a_text_only_pack_gives_every_trained_tensor_a_gradient(case):
    """What a picture's pack leaves without one is what the family calls unused, and the guard leaves out the same."""
    missing = {}
    for kind, samples in (("text", [conversation(1, [])]), ("image", [conversation(2, [(90, 60)])])):
        model = model_of(case).train()
        use_attention(model, "sdpa_segments")
        summed_loss(model, to_device(pack_of(case, samples), "cpu", torch.float32), 64).backward()
        missing[kind] = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        if kind == "text":
            outside = [name for part in ("vision", "projector") for name, _ in part_parameters(model)[part]]
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            text_too = [name for name in outside if "gated_cross_attn" in name and ".cross_attn" not in name]  # whatever a token sees
            assert all(not gradients[name].any() for name in {*outside} - {*text_too} if gradients[name] is not None)
    family = family_of_model(model)
    assert missing["text"] == missing["image"] == set(family.unused(case.config, [n for n, _ in model.named_parameters()]))


def test_the_planner_counts_what_the_class_has(case):
    model = build_model(case.section, case.config)
    shape = shape_of_config(case.config.to_dict(), case.name)
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(model).items()}
    assert parameter_counts(shape) == counted
    family, sizes = family_of_model(model), part_sizes(shape)
    for part in ("vision", "language"):
        blocks = [sum(p.numel() for p in block.parameters()) for block in family.blocks_of(model, part)]
        assert sizes[part].block == max(blocks, default=0)
        assert sizes[part].in_blocks == sum(blocks)
    named = dict(model.named_parameters())
    unused: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name in family.unused(case.config, list(named)):
        unused[family.part_of(name)] += named[name].numel()
    assert {part: size.unused for part, size in sizes.items()} == unused


@pytest.mark.parametrize("trained", [("projector",), ("vision", "projector", "language")], ids="+".join)
def test_the_planner_s_flops_are_those_of_the_flop_counter(case, trained, monkeypatch):
    load, visual_tokens, found = flops(case, trainable(case, trained), monkeypatch)
    assert load.visual_tokens == visual_tokens or case.name in TILED
    for counted, planned in found:
        assert counted == pytest.approx(planned, rel=0.01)


def test_the_export_loads_in_transformers_with_equal_logits(case, tmp_path):
    model = model_of(case, 0.05)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    final = export_hf(state, case.config, case.tokenizer.directory, tmp_path / "final", pixels=case.pixels)
    loaded, told = AutoModelForImageTextToText.from_pretrained(final, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    example = pack_of(case, [conversation(1, [(120, 80)])])
    use_attention(model, "sdpa_segments")
    with torch.no_grad():
        ours, _ = pack_logits_hidden(model, to_device(example, "cpu", torch.float32))
        theirs = loaded.eval()(**reference_inputs(case, example, loaded), use_cache=False).logits[0]
    ours, theirs = seen(case, ours), seen(case, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    preprocessor = json.loads((final / "preprocessor_config.json").read_text())
    assert case.family.exported_pixels(preprocessor)[1] == case.family.exported_pixels(case.family.preprocessor(case.pixels))[1]
    if case.family.processor():
        assert json.loads((final / "processor_config.json").read_text())["processor_class"] == preprocessor["processor_class"]


def test_greedy_decoding_equals_generate(case):
    """The rollout engine, three prompts of different shapes, the third in the place of another, against transformers' own decoding."""
    from terrace.data.prompt import read_prompt
    from terrace.generation.interface import Prompt, Sampling

    model = model_of(case)
    reference = AutoModelForImageTextToText.from_config(case.config, dtype=torch.float32, attn_implementation="sdpa").eval()
    reference.load_state_dict(model.state_dict())
    use_shared_prompt_attention(model, "sdpa_segments")
    never, stop = forbidden_tokens(case.tokenizer, case.config), stop_tokens(case.tokenizer, case.config)
    prompts = []
    for number, sizes in enumerate(([(90, 60)], [], [(60, 120), (100, 100)])):
        loaded = conversation(number, sizes)
        read = read_prompt(loaded.sample, loaded.images, loaded.sizes, case.tokenizer, case.family, case.pixels)
        prompts.append(Prompt(**vars(read.inputs), key=("s", number), id=str(number)))
    engine = NativeEngine(model, never, stop, "cpu", "fp32", max_rows=4)
    groups = engine.generate(prompts, Sampling(samples=2, max_tokens=8, temperature=0.0))
    for prompt, group in zip(prompts, groups):
        inputs = reference_inputs(case, prompt, reference)
        if inputs.get("pixel_values", 0) is None:  # BLIP-2 generates nothing without an image
            continue
        out = reference.generate(
            **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=list(never), eos_token_id=list(stop), pad_token_id=stop[0]
        )
        expected = out[0, inputs["input_ids"].shape[1] :].tolist()
        for response in group:
            assert response.tokens.tolist() == expected[: len(response.tokens)]
            assert len(response.tokens) == len(expected)


@pytest.mark.slow
def test_decoding_with_weights_in_shards_says_the_same(case):
    """On two ranks with different prompts, the second rank's first one ended earlier; every family's parts are gathered as they run."""
    from terrace.data.prompt import read_prompt
    from terrace.generation.copies import EngineOnCopy, light_copy
    from terrace.generation.interface import Prompt, Sampling
    from terrace.generation.sharded_weights import ShardedWeights
    from terrace.worker.context import WorkerContext

    model = model_of(case)
    use_shared_prompt_attention(model, "sdpa_segments")
    never, stop = forbidden_tokens(case.tokenizer, case.config), stop_tokens(case.tokenizer, case.config)
    prompts = []
    for number, sizes in enumerate(([(90, 60)], [(40, 40)], [(60, 120), (100, 100)])):
        loaded = conversation(number, sizes)
        read = read_prompt(loaded.sample, loaded.images, loaded.sizes, case.tokenizer, case.family, case.pixels)
        prompts.append(Prompt(**vars(read.inputs), key=("s", number), id=str(number)))
    mine, sampling = [prompts[:2], prompts[2:]], Sampling(samples=2, max_tokens=6, seed=3)

    def work(rank, ranks):
        copy = light_copy(case.config, torch.float32)
        weights = ShardedWeights(copy, WorkerContext(rank=rank, world_size=ranks, local_rank=rank))
        use_shared_prompt_attention(copy, "sdpa_segments")
        engine = EngineOnCopy(weights, NativeEngine(copy, never, stop, "cpu", "fp32", max_rows=2), stays=False)
        engine.update_weights(lambda: ((name, value.detach()) for name, value in model.named_parameters()))
        with engine.together():
            return engine.generate(mine[rank], sampling)

    for some, groups in zip(mine, run_threads(2, work)):
        reference = NativeEngine(model, never, stop, "cpu", "fp32", max_rows=2)
        reference._short_step = lambda: None
        for one, other in zip(reference.generate(some, sampling), groups, strict=True):
            assert [a.tokens.tolist() for a in one] == [b.tokens.tolist() for b in other]
            assert [a.logprobs.tolist() for a in one] == [b.logprobs.tolist() for b in other]


def test_a_shared_prompt_gives_the_logits_of_separate_sequences(case):
    """Units, which GRPO and reward models train on: a prompt with two answers against each pair alone."""
    from terrace.data.types import following_positions
    from terrace.models.shared_prompt import Unit, units_hidden

    model = model_of(case)
    use_shared_prompt_attention(model, "sdpa_segments")
    example = pack_of(case, [conversation(1, [(90, 60)])])
    answers = [np.asarray([40, 41, 42], np.int32), np.asarray([50, 51], np.int32)]

    def with_answers(chosen):
        from dataclasses import replace

        ids = np.concatenate([example.input_ids, *chosen])
        places = [following_positions(example.position_ids, len(answer)).astype(np.int32) for answer in chosen]
        return replace(
            example, input_ids=ids, position_ids=np.concatenate([example.position_ids, *places], axis=1),
            targets=np.where(np.arange(len(ids)) < example.tokens - 1, -100, 1).astype(np.int32),
            segment_ends=np.asarray([len(ids)], np.int32),
        )  # fmt: skip

    length = example.tokens
    with torch.no_grad():
        shared = units_hidden(model, to_device(with_answers(answers), "cpu", torch.float32), [Unit(0, length, (3, 2))])
        first = pack_hidden(model, to_device(with_answers(answers[:1]), "cpu", torch.float32))
        second = pack_hidden(model, to_device(with_answers(answers[1:]), "cpu", torch.float32))
    expected = torch.cat([first, second[length:]])
    torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-5)


def test_attention_keywords_reach_every_language_layer(case):
    model = model_of(case)
    use_shared_prompt_attention(model, "sdpa_segments")
    from terrace.models.shared_prompt import Unit

    kept = {}
    example = pack_of(case, [conversation(1, [])])
    with torch.no_grad():
        hidden_states(model, to_device(example, "cpu", torch.float32), prompt_units=[Unit(0, example.tokens)], keep=kept)
    layers = set(range(language_config(CONFIGS[case.name])["num_hidden_layers"])) - set(getattr(case.family, "crossing", ()))
    assert {layer for layer in kept if layer >= 0} == layers


def test_a_recipe_of_the_family_validates_and_its_mistakes_are_named(name):
    from terrace.recipe.rules import check
    from terrace.recipe.schema import Recipe

    def problems(model):
        train = {family_class(name).trainable()[-2:][0]: {"lr": 1e-3}}
        recipe = Recipe.model_validate({
            "name": "r", "model": model, "tokenizer": {"train_vocabulary_size": 400}, "data": {"sources": {"a": {"uri": "x"}}},
            "stages": [{"name": "s", "train": train, "mixture": {"weights": {"a": 1.0}}, "budget": {"steps": 1},
                        "sequence_length": 4096, "precision": "fp32"}],
        })  # fmt: skip
        return [str(problem) for problem in check(recipe)]

    assert problems(recipe_model(name)) == []
    broken = json.loads(json.dumps(recipe_model(name)))
    del language_config(broken["config"])["num_hidden_layers"]
    broken["config"].pop("vision_config", None)
    told = problems(broken)
    assert any("needs `num_hidden_layers`" in line for line in told)
    assert any("needs `vision_config`" in line for line in told) == ("vision_config" in CONFIGS[name])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", [("projector",), ("vision", "projector"), tuple(PARTS)], ids="+".join)
def test_the_planner_s_activations_are_what_autograd_saves(name, folder, trained, checkpointing, monkeypatch):
    """ddp on a CPU: everything saved for backward, without the weights themselves, within 10 %."""
    case = middle_case(name, folder)
    measured, planned = activations(case, trainable(case, trained), checkpointing, monkeypatch)
    assert measured == pytest.approx(planned, rel=0.1)


def test_the_export_s_image_processor_and_tokenizer_need_nothing_of_terrace(case, tmp_path):
    """Auto classes read `final/` and give the pixels and ids of training; whole processors where they can be made.

    The processors of the Qwen models and of InternVL hold a video processor that transformers makes with torchvision alone.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    model = model_of(case, 0.05)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    final = export_hf(state, case.config, case.tokenizer.directory, tmp_path / "final", pixels=case.pixels)
    sample = conversation(1, [(120, 80)])
    example = pack_of(case, [sample])
    image = _decoded(sample.images[0])
    if case.name in NEEDS_TORCHVISION:
        pytest.skip("its image processor needs torchvision")
    given = AutoImageProcessor.from_pretrained(final, trust_remote_code=True)([image], return_tensors="pt")
    given = {"pixel_values": given} if isinstance(given, torch.Tensor) else given  # Idefics' gives them bare
    if "pixel_values" in given:  # Fuyu's whole processor cuts the patches
        ours = reference_inputs(case, example, model)["pixel_values"]
        assert given["pixel_values"].numel() == ours.numel()
        assert float((given["pixel_values"].reshape(ours.shape) - ours).abs().mean()) < 0.02
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.convert_tokens_to_ids(case.family.marks["image"]) == case.config.image_token_id
    assert tokenizer.decode(example.input_ids) == case.tokenizer.decode(example.input_ids)
    turns = [("user", "How many circles?"), ("assistant", "3"), ("user", "A red circle?"), ("assistant", "A blue circle")]
    turns = turns[:2] if case.name in ONE_QUESTION else turns
    written = encode_sample(_turns(turns), [], case.tokenizer, case.family, case.pixels).input_ids.tolist()
    messages = [{"role": role, "content": text} for role, text in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False) == written
    asked = encode_prompt(_turns(turns), [], case.tokenizer, case.family, case.pixels).input_ids.tolist()
    assert tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False) == asked
    if case.name in WHOLE_PROCESSORS:
        processor = AutoProcessor.from_pretrained(final)
        question = [{"type": "image", "image": 0}, {"type": "text", "text": "What?"}]
        sample = Sample("s", "qa", [{"role": "user", "content": question}])
        asked = encode_prompt(sample, [image.size], case.tokenizer, case.family, case.pixels)
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        assert processor(text=text, images=[image], return_tensors="pt")["input_ids"][0].tolist() == asked.input_ids.tolist()


def _turns(turns):
    return Sample("s", "qa", [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns])


def _decoded(data):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")
