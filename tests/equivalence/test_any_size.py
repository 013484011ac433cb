"""Towers that see pictures of any size: slices one by one against transformers' own towers, the resampler's formula, text, export."""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from families import CONFIGS, SIGLIP, Case, case_of, conversation, model_of, pack_of
from transformers import CLIPVisionModel, SiglipVisionModel
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionConfig, Idefics2VisionEmbeddings

from terrace.data.prompt import read_prompt
from terrace.data.template import encode_prompt
from terrace.data.types import Sample
from terrace.families.registry import make_family
from terrace.families.slicing import sliced
from terrace.generation.engines import forbidden_tokens, stop_tokens
from terrace.generation.interface import Prompt, Sampling
from terrace.generation.native import NativeEngine
from terrace.models.attention import use_attention
from terrace.models.batch import image_facts, to_device
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.models.families.registry import family_of_model
from terrace.models.forward import pack_hidden
from terrace.models.modules.sine_positions import resized_positions, sine_positions
from terrace.models.modules.sliced_towers import bucketed_places
from terrace.models.parts import part_parameters
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.objectives.lm import summed_loss
from terrace.planner.parameters import parameter_counts
from terrace.planner.plan import make_plan
from terrace.planner.shapes import shape_of_config
from terrace.recipe.errors import RecipeError
from terrace.recipe.loading import parse_recipe
from terrace.recipe.schema import Model

BASE = CONFIGS["terrace_vlm_any_size"]
KEYS = BASE["connector"] | {"positions": "keys", "queries": 6}
VARIANTS = {  # LLaVA-UHD's, MiniCPM-V's, CogVLM's pictures
    "separated": {"pictures": {"scale": 56, "sides": "down", "overview": "last", "text": "separated"}},
    "bucketed": {
        "pictures": {"scale": 84, "positions": "bucketed", "text": "marked"}, "connector": KEYS, "vision_feature_layer": -1,
        "vision_config": BASE["vision_config"] | SIGLIP | {"image_size": 140},
    },
    "square": {
        "pictures": {"layout": "square", "scale": 84, "text": "marked", "text_positions": "one"}, "connector": {"kind": "glu", "width": 40},
    },
}  # fmt: skip
PIXELS = {"separated": (1, 6 * 56**2), "bucketed": (1, 4 * 84**2), "square": (1, 84**2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("tokenizers")


def variant(name: str, folder) -> Case:
    values = copy.deepcopy(BASE) | VARIANTS[name]
    small = case_of("terrace_vlm_any_size", folder)
    section = Model.model_validate({"architecture": "terrace_vlm_any_size", "config": values})
    family = small.tokenizer.fit(make_family("terrace_vlm_any_size", section.config or {}))
    return Case("terrace_vlm_any_size", section, family, small.tokenizer, model_config(section, small.tokenizer), PIXELS[name])


def tower_alone(case: Case, model, picture: torch.Tensor) -> torch.Tensor:
    """transformers' own tower over one picture [3, H, W], whole and without padding: patches' features [P, W]."""
    tower = model.model.vision_tower
    kind = SiglipVisionModel if case.family.siglip else CLIPVisionModel
    plain = kind(tower.config).eval()
    plain.load_state_dict(tower.state_dict())
    _, height, width = picture.shape
    if case.section.config["pictures"].get("positions") == "bucketed":  # NaViT's, from Idefics2's class
        fields = {"hidden_size": 32, "image_size": tower.config.image_size, "patch_size": 14}
        embeddings = Idefics2VisionEmbeddings(Idefics2VisionConfig(**fields))
        embeddings.load_state_dict(plain.embeddings.state_dict())
        hidden = embeddings(picture[None], torch.ones(1, height // 14, width // 14, dtype=torch.bool))
        return plain.post_layernorm(plain.encoder(inputs_embeds=hidden).last_hidden_state)[0]
    given = plain(picture[None], interpolate_pos_encoding=True, output_hidden_states=True)
    return given.hidden_states[case.config.vision_feature_layer][0, 1:]


def connector_alone(case: Case, model, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The resampler's formula over one picture: softmax(QK / sqrt(d)) V with sine positions on keys, and on queries or not."""
    module = model.model.multi_modal_projector
    if case.section.config["connector"]["kind"] != "resampler":
        return module(features[None], rows, columns)[0]

    def norm(x, layer):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias

    values, queries = norm(features @ module.kv_proj.weight.T, module.kv_norm), norm(module.query, module.query_norm)
    side, width = math.isqrt(len(queries)), queries.shape[1]
    if module.positions == "keys":
        keys = values + sine_positions(width, rows, columns)
    else:
        queries, keys = queries + sine_positions(width, side, side), values + resized_positions(width, side, rows, columns)
    projected = zip((module.q_proj, module.k_proj, module.v_proj), (queries, keys, values))
    q, k, v = (layer(x).view(len(x), module.heads, -1) for layer, x in projected)
    weights = (torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    out = module.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return norm(out, module.output_norm) @ module.output_proj.weight.T


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "bucketed" else pytest.mark.slow) for name in VARIANTS])
def test_each_picture_is_what_the_tower_makes_of_it_alone_and_the_plan_counts_the_model(name, folder):
    """Of several pictures in different slices: positions, the mask over padding, the connector, the order; then gradients and counts."""
    case = variant(name, folder)
    model = model_of(case)
    use_attention(model, "sdpa_segments")
    sizes = [(150, 60), (30, 40), (61, 190)]
    example = pack_of(case, [conversation(number, [size]) for number, size in enumerate(sizes)] + [conversation(4, [])])
    family = family_of_model(model)
    facts = image_facts(example)
    pictures = [one for row in facts.facts.tolist() for one in case.family.tower_pictures(row)]
    assert (len(set(pictures)) > 1) == (name != "square")
    with torch.no_grad():
        patches = family.normalised(torch.from_numpy(example.pixels), torch.float32)
        given = family.features(model, patches, facts).pooled
        expected, place = [], 0
        for rows, columns in pictures:
            own = patches[place : place + rows * columns].view(rows, columns, 3, 14, 14).permute(2, 0, 3, 1, 4)
            seen = tower_alone(case, model, own.reshape(3, rows * 14, columns * 14))
            expected.append(connector_alone(case, model, seen, rows, columns))
            place += rows * columns
        expected = torch.cat(expected)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        singles = [pack_of(case, [conversation(number, [size])]) for number, size in enumerate(sizes)]
        alone = [pack_hidden(model, to_device(single, "cpu", torch.float32)) for single in singles]
        packed = pack_hidden(model, to_device(example, "cpu", torch.float32))[: sum(map(len, alone))]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    summed_loss(model.train(), to_device(example, "cpu", torch.float32), 64).backward()
    missing = {n for n, parameter in model.named_parameters() if parameter.grad is None}
    assert missing == set(family.unused(case.config, [n for n, _ in model.named_parameters()]))
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(build_model(case.section, case.config)).items()}
    assert parameter_counts(shape_of_config(case.config.to_dict(), case.name)) == counted


def test_patches_read_the_place_of_the_square_that_they_fall_into():
    assert bucketed_places(2, 3, 4).tolist() == [0, 1, 2, 8, 9, 10]  # shares 0, 1/3, 2/3 of four columns; 0, 1/2 of four rows
    assert bucketed_places(4, 4, 4).tolist() == list(range(16))


def test_slices_of_llava_uhd_never_have_more_patches_than_the_tower_and_keep_their_aspect():
    rng = np.random.default_rng(0)
    nearest = 0
    for width, height in rng.integers(20, 3000, (400, 2)).tolist():
        grid, overview, part = sliced(width, height, 336, 14, 6, exceeding=False)
        for size in (overview, part) if grid[0] else (overview,):
            assert size[0] * size[1] <= 336 * 336
            assert not size[0] % 14
            assert not size[1] % 14
        assert grid[0] * grid[1] <= 6
        rows, columns = grid[0] or 1, grid[1] or 1
        high, wide = part if grid[0] else overview
        if max(height / rows, width / columns) < 6 * min(height / rows, width / columns):
            assert math.log((wide / high) / ((width / columns) / (height / rows))) == pytest.approx(0, abs=0.25)  # a patch of ten at most
            assert high * wide > 0.8 * 336 * 336
        nearest += sliced(width, height, 336, 14, 6)[2] != part
    assert nearest > 100


WRITTEN = {
    "separated": "QQ,QQ\nQQ,QQ\nQQ",
    "bucketed": "<image>QQ</image><slice><image>QQ</image><image>QQ</image>\n<image>QQ</image><image>QQ</image></slice>",
    "square": "<image>QQ</image>",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_picture_reads_as_its_system_writes_it(name, folder):
    case = variant(name, folder)
    size = (170, 160) if name == "bucketed" else (112, 112)
    sample = Sample("s", "qa", [{"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "What?"}]}])
    read = encode_prompt(sample, [size], case.tokenizer, case.family, case.pixels)
    [visual], [view] = read.visuals, read.views
    each = case.family.queries or view.tokens
    expected = WRITTEN[name].replace("QQ", "<|image_pad|>" * each)
    assert case.tokenizer.decode(read.input_ids[visual.start : visual.start + visual.length]) == expected
    assert view.tokens == WRITTEN[name].count("QQ") * each


def test_the_tokens_of_a_square_share_a_position_in_training_and_in_the_class_s_own_forward_and_generate(folder):
    """As counted by hand; the class alone, which is told ids and pixels; its decoding, with a picture in the prompt, and the engine's."""
    case = variant("square", folder)
    model = model_of(case)
    sample = conversation(1, [(90, 60), (50, 50)])
    example = pack_of(case, [sample, conversation(2, [(30, 30)])])
    image, at, expected = case.config.image_token_id, -1, []
    for place, token in enumerate(example.input_ids.tolist()):
        start = place in (0, *example.segment_ends[:-1])
        at = 0 if start else at + (token != image or example.input_ids[place - 1] != image)
        expected.append(at)
    assert example.position_ids.shape[0] == 2
    assert example.position_ids[1].tolist() == expected
    assert int((example.input_ids == image).sum()) == 3 * 36 == example.visual_tokens
    reference = type(model)(case.config).eval()
    reference.load_state_dict(model.state_dict())
    family = family_of_model(model)
    use_attention(model, "sdpa_segments")
    alone = pack_of(case, [sample])
    inputs = family.inputs(family.normalised(torch.from_numpy(alone.pixels), torch.float32), image_facts(alone))
    ids = torch.from_numpy(alone.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        ours = model.lm_head(pack_hidden(model, to_device(alone, "cpu", torch.float32)))
        theirs = reference(input_ids=ids, **inputs).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
        counted = reference.model(input_ids=ids, **inputs, position_ids=torch.arange(ids.shape[1])[None]).last_hidden_state
        assert float((reference.lm_head(counted)[0] - theirs).abs().max()) > 0.01 * float(theirs.abs().max())
    never, stop = forbidden_tokens(case.tokenizer, case.config), stop_tokens(case.tokenizer, case.config)
    use_shared_prompt_attention(model, "sdpa_segments")
    read = read_prompt(sample.sample, sample.images, sample.sizes, case.tokenizer, case.family, case.pixels)
    prompt = Prompt(**vars(read.inputs), key=("s", 1), id="1")
    engine = NativeEngine(model, never, stop, "cpu", "fp32", max_rows=4)
    [[answer]] = engine.generate([prompt], Sampling(samples=1, max_tokens=8, temperature=0.0))
    asked = torch.from_numpy(prompt.input_ids.astype(np.int64))[None]
    out = reference.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=list(never),
        eos_token_id=list(stop), pad_token_id=stop[0],
    )  # fmt: skip
    assert answer.tokens.tolist() == out[0, asked.shape[1] :].tolist()


def test_a_stage_below_a_slice_sees_one_picture_of_its_pixels_and_is_planned_so(folder):
    case = variant("bucketed", folder)
    for most, rows in ((28 * 28, 4), (42 * 42, 9), (84 * 84, 36)):
        view = case.family.view(300, 300, (1, most))
        assert (view.rows, view.tokens, view.facts[:2]) == (rows, 6, (0, 0))
    square = variant("square", folder)
    assert [square.family.view(300, 100, (1, side**2)).facts for side in (28, 50, 900)] == [(0, 0, n, n, 0, 0) for n in (2, 3, 6)]
    flops = [stage.pack_flops.forward["vision"] / stage.work.pack.visual_tokens for stage in make_plan(parse_recipe({
        "name": "r", "model": case.section.model_dump(exclude_none=True), "tokenizer": {"train_vocabulary_size": 400},
        "data": {"sources": {"a": {"uri": "x"}}},
        "stages": [{"name": f"s{most}", "train": {"vision": {"lr": 1e-3}}, "mixture": {"a": 1.0}, "budget": {"steps": 1},
                    "pixels": {"min": 1, "max": most}} for most in (28 * 28, 84 * 84)],
    }, "r")).stages]  # fmt: skip
    assert 9 <= flops[1] / flops[0] < 12  # nine times the patches for as many tokens, and attention over more


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_layout": "tiles"}, "image_layout: is said by the architecture terrace_vlm_any_size"),
        ({"connector": {"kind": "mlp"}}, "connector.kind: must be resampler, not mlp, with this layout of `pictures`"),
        ({"pictures": {"layout": "square"}, "connector": {"kind": "q_former"}}, "must be resampler or linear or mlp or mlp_"),
        ({"pictures": {"scale": 50}}, "pictures.scale: 50 is no multiple of patch_size 14"),
        ({"pictures": {"sides": "up"}}, "pictures.sides: must be one of nearest, down"),
        ({"pictures": {"position": "bucketed"}}, "pictures.position: is no option: there are scale, layout, text, sides"),
        ({"pictures": "slices"}, "pictures: must be a map of scale, layout"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes, told):
    with pytest.raises(RecipeError, match=re.escape(told)):
        parse_recipe({
            "name": "r", "model": {"architecture": "terrace_vlm_any_size", "config": BASE | changes},
            "tokenizer": {"train_vocabulary_size": 400}, "data": {"sources": {"a": {"uri": "x"}}},
            "stages": [{"name": "s", "train": {"projector": {"lr": 1e-3}}, "mixture": {"a": 1.0}, "budget": {"steps": 1}}],
        }, "r")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_an_export_answers_from_a_file_where_there_is_no_terrace(name, folder, tmp_path):
    """Its own model, processor and slicing: pixels and logits of a picture as training has them."""
    case = variant(name, folder)
    model = model_of(case, 0.05)
    state = {n: parameter.detach() for n, parameter in model.named_parameters()}
    final = export_hf(state, case.config, case.tokenizer.directory, tmp_path / "final", pixels=case.pixels)
    sample = conversation(1, [(150, 70)])
    example = pack_of(case, [sample])
    use_attention(model, "sdpa_segments")
    with torch.no_grad():
        expected = model.lm_head(pack_hidden(model, to_device(example, "cpu", torch.float32)))
    (tmp_path / "picture.png").write_bytes(sample.images[0])
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    torch.save({"ids": ids, "expected": expected}, tmp_path / "given.pt")
    program = (
        "import sys, torch; from PIL import Image; from transformers import AutoImageProcessor, AutoModelForImageTextToText\n"
        "given = torch.load(sys.argv[2])\n"
        "processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "pixels = processor([Image.open(sys.argv[3])], return_tensors='pt')\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()\n"
        "out = model(input_ids=given['ids'], **pixels).logits[0]\n"
        "difference = (out - given['expected']).abs().max() / given['expected'].abs().max()\n"
        "assert difference < 0.05, difference\n"  # Pillow's resize against torch's
        "assert 'terrace' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(final), str(tmp_path / "given.pt"), str(tmp_path / "picture.png")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
