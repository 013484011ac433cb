"""Samples to tokens and positions: equal to transformers and to the Qwen2.5 chat template, and measured exactly."""

from __future__ import annotations

from types import MethodType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.data.template import encode_prompt, encode_sample, measure_sample
from terrace.data.tokenizer import load_tokenizer, train_tokenizer
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.families.interface import Visual
from terrace.families.qwen2_5_vl import Qwen25VL

FAMILY = Qwen25VL()

PIXELS = (3136, 100_352)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    texts = ["A red circle and 3 blue squares at [12, 345].\nuser assistant system\n", "You are a helpful assistant."]
    return train_tokenizer(texts * 40, 400, tmp_path_factory.mktemp("tokenizer"), FAMILY)


def text(value):
    return {"type": "text", "text": value}


def image(number):
    return {"type": "image", "image": number}


def conversation(*turns, **metadata):
    return Sample("s1", "qa", [{"role": role, "content": content} for role, content in turns], metadata)


def running(*items):
    return Sample("s2", "document", [{"role": "text", "content": list(items)}])


def reference_positions(ids, image_grids=(), video_grids=(), seconds_per_grid=(), pads=(-1, -2)):
    """rows t, h, w of transformers' own get_rope_index."""
    torch = pytest.importorskip("torch")
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = MethodType(Qwen2_5_VLModel.get_vision_position_ids, model)
    ids = torch.tensor(np.asarray(ids), dtype=torch.long)[None]
    kinds = (ids == pads[0]).int() + 2 * (ids == pads[1]).int()
    positions, _ = Qwen2_5_VLModel.get_rope_index(
        model,
        ids,
        mm_token_type_ids=kinds,
        image_grid_thw=torch.tensor(np.asarray(image_grids).reshape(-1, 3)),
        video_grid_thw=torch.tensor(np.asarray(video_grids).reshape(-1, 3)),
        second_per_grid_ts=torch.tensor(seconds_per_grid) if len(seconds_per_grid) else None,
    )
    return positions[:, 0].numpy()


def test_positions_of_the_published_example():
    found = FAMILY.positions(13, [Visual(4, 6, (1, 4, 6))])
    assert found[0].tolist() == list(range(13))
    assert found[1].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7, 8, 9]
    assert found[2].tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8, 9]
    assert found[3].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]
    assert (found[1:] == reference_positions([1, 2, 3, 9] + [-1] * 6 + [8, 4, 5], [(1, 4, 6)])).all()


@settings(max_examples=30, deadline=None)
@given(
    before=st.integers(1, 5),
    shapes=st.lists(
        st.tuples(st.booleans(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)), max_size=4
    ),
    fps=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
)
def test_positions_equal_transformers(before, shapes, fps):
    ids, visuals, images, videos = [0] * before, [], [], []
    for is_video, frames, rows, columns, after in shapes:
        grid = (frames if is_video else 1, 2 * rows, 2 * columns)
        stamps = [frame / fps for frame in range(2 * frames)]
        tokens = grid[0] * grid[1] * grid[2] // 4
        visuals.append(Visual(len(ids), tokens, grid, tuple(stamps[::2]) if is_video else None))
        (videos if is_video else images).append(grid)
        ids += [-2 if is_video else -1] * visuals[-1].tokens + [0] * after
    found = FAMILY.positions(len(ids), visuals)
    assert found.dtype == np.int32
    assert (found[1:] == reference_positions(ids, images, videos, [2 / fps] * len(videos))).all()


def test_conversation_equals_the_chat_template(tokenizer):
    """The ids equal those that the Hugging Face template and tokenizer give, image places repeated."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(tokenizer.directory)
    turns = [("user", "3 squares?\n\n  Where: [12, 345]"), ("assistant", "At [1, 2].\n"), ("user", " why"), ("assistant", "é 9")]
    content = [[text(value)] for _, value in turns]
    content[0] = [image(0), *content[0]]
    sample = conversation(*[(role, items) for (role, _), items in zip(turns, content)])
    encoded = encode_sample(sample, [(112, 84)], tokenizer, FAMILY, PIXELS)
    messages = [{"role": role, "content": value} for role, value in turns]
    messages[0] = {"role": "user", "content": [{"type": "image"}, text(turns[0][1])]}
    rendered = reference.apply_chat_template(messages, tokenize=False)
    assert rendered.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_st")
    rendered = rendered.replace("<|image_pad|>", "<|image_pad|>" * 12)
    assert encoded.input_ids.tolist() == reference(rendered, add_special_tokens=False)["input_ids"]
    prompt = encode_prompt(sample, [(112, 84)], tokenizer, FAMILY, PIXELS)
    asked = reference.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    asked = asked.replace("<|image_pad|>", "<|image_pad|>" * 12)
    assert prompt.input_ids.tolist() == reference(asked, add_special_tokens=False)["input_ids"]


def test_real_qwen_tokenizer(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "qwen2")
    assert tokenizer.marks(FAMILY)["start_of_turn"] == 151_644
    assert tokenizer.marks(FAMILY)["image"] == 151_655
    assert tokenizer.splits_digits
    from jinja2 import Template
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(shared_data / "tokenizers" / "qwen2" / "tokenizer.json"))
    sample = conversation(("user", [text("Hi, 12+30?")]), ("assistant", [text("42 — 四十二")]))
    messages = [{"role": m["role"], "content": m["content"]} for m in sample.messages]
    rendered = Template(FAMILY.chat_template).render(messages=messages)
    encoded = encode_sample(sample, [], tokenizer, FAMILY, PIXELS)
    assert encoded.input_ids.tolist() == reference.encode(rendered, add_special_tokens=False).ids
    assert tokenizer.decode(encoded.input_ids) == rendered


def test_supervision(tokenizer):
    sample = conversation(("user", [image(0), text("Where?")]), ("assistant", [text("Here")]))
    encoded = encode_sample(sample, [(56, 56)], tokenizer, FAMILY, PIXELS)
    assert tokenizer.decode(encoded.input_ids[encoded.supervised]) == "Here<|im_end|>"
    caption = running(image(0), text("A circle."))
    encoded = encode_sample(caption, [(56, 56)], tokenizer, FAMILY, PIXELS)
    assert tokenizer.decode(encoded.input_ids[encoded.supervised]) == "A circle.<|endoftext|>"
    assert encoded.facts.tolist() == [[1, 4, 4]]
    everything = encode_sample(sample, [(56, 56)], tokenizer, FAMILY, PIXELS, supervise="all_text")
    assert "Where?" in tokenizer.decode(everything.input_ids[everything.supervised])
    assert not everything.supervised[everything.input_ids == tokenizer.marks(FAMILY)["image"]].any()


def test_marks_in_data_are_text(tokenizer):
    encoded = encode_sample(running(text("<|im_end|><|image_pad|>")), [], tokenizer, FAMILY, PIXELS)
    special = [token for token in encoded.input_ids.tolist() if token in tokenizer.marks(FAMILY).values()]
    assert special == [tokenizer.marks(FAMILY)["end_of_text"]]


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(20, 3000),
    height=st.integers(20, 3000),
    share=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    limit=st.sampled_from([3136, 50_176, 401_408, 1_003_520]),
    words=st.text(alphabet="ab 1é\n{}:,\"", max_size=12),
    box=st.booleans(),
)
def test_length_is_arithmetic(tokenizer, width, height, share, limit, words, box):
    numbers = sorted(round(x * width) for x in share[:2]), sorted(round(y * height) for y in share[2:])
    value = [numbers[0][0], numbers[1][0], numbers[0][1], numbers[1][1]]
    place = {"type": "box", "image": 0, "box": value} if box else {"type": "point", "image": 0, "point": value[:2]}
    sample = conversation(("user", [image(0), text("q" + words)]), ("assistant", [text(words), place, text(words)]))
    measure = measure_sample(sample, [(width, height)], tokenizer, FAMILY)
    encoded = encode_sample(sample, [(width, height)], tokenizer, FAMILY, (3136, limit))
    assert measure.length([(width, height)], (3136, limit), FAMILY) == len(encoded.input_ids)


def test_box_is_rendered_in_resized_pixels(tokenizer):
    sample = conversation(("user", [image(0)]), ("assistant", [{"type": "box", "image": 0, "box": [0, 10, 1000, 500]}]))
    encoded = encode_sample(sample, [(1000, 500)], tokenizer, FAMILY, (3136, 28 * 28 * 8))
    assert tokenizer.decode(encoded.input_ids[encoded.supervised]) == "[0, 1, 111, 55]<|im_end|>"  # 112 x 56


def test_video_tokens_and_measure(tokenizer):
    clip = {"type": "video", "frames": [0, 1, 2], "timestamps": [0.0, 0.5, 1.0]}
    sample = Sample("v", "video", [{"role": "user", "content": [clip]}, {"role": "assistant", "content": [text("A dog")]}])
    sizes = [(56, 56)] * 3
    encoded = encode_sample(sample, sizes, tokenizer, FAMILY, PIXELS)
    assert encoded.facts.tolist() == [[2, 4, 4]]
    assert (encoded.input_ids == tokenizer.marks(FAMILY)["video"]).sum() == 8
    assert encoded.images == ((0, 1, 2),)
    first = int(np.flatnonzero(encoded.input_ids == tokenizer.marks(FAMILY)["video"])[0])
    assert encoded.positions[1, first : first + 8].tolist() == [first] * 4 + [first + 2] * 4  # one second later
    assert measure_sample(sample, sizes, tokenizer, FAMILY).length(sizes, PIXELS, FAMILY) == len(encoded.input_ids)


@pytest.mark.parametrize(
    ("sample", "sizes", "says"),
    [
        (conversation(("user", [text("q")]), ("assistant", [text("")])), [], "no text to learn"),
        (running(image(0), text("t")), [], "refers to image 0"),
        (running(text("t")), [(56, 56)], "has 1 images"),
        (running(image(0)), [(56, 56)], "no text to learn"),
    ],
)
def test_refused_samples_are_named(tokenizer, sample, sizes, says):
    with pytest.raises(InputError, match=rf"sample {sample.id}: .*{says}"):
        measure_sample(sample, sizes, tokenizer, FAMILY)


def test_training_a_tokenizer_is_repeatable(tmp_path):
    texts = [f"word{number % 7} and {number} more\n" for number in range(200)]
    first, second = (train_tokenizer(texts, 350, tmp_path / name, FAMILY) for name in ("a", "b"))
    assert first.fingerprint == second.fingerprint
    assert first.splits_digits
    broken = (tmp_path / "a" / "tokenizer.json").read_text().replace("<|image_pad|>", "<|other|>")
    (tmp_path / "b" / "tokenizer.json").write_text(broken)
    with pytest.raises(InputError, match="lacks the tokens"):
        type(first)(tmp_path / "b").marks(FAMILY)
