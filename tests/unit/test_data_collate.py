"""Packs from samples: segments whole and in order, targets inside them, spans, videos, and damage by name."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from terrace.data.order.eligible import Sized, _fitted
from terrace.data.stream.collate import CollateSettings, LoadedSample, collate
from terrace.data.template import encode_sample, measure_sample
from terrace.data.tokenizer import train_tokenizer
from terrace.data.types import PackSpec, Sample, SampleRef
from terrace.errors import DamagedData
from terrace.families.qwen2_5_vl import Qwen25VL

FAMILY = Qwen25VL()

PIXELS = (784, 12_544)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    texts = ["A red circle and 3 blue squares.\n", "You are a helpful assistant.\nuser\nassistant\nsystem\n"]
    return train_tokenizer(texts * 40, 400, tmp_path_factory.mktemp("tokenizer"), FAMILY)


@pytest.fixture
def config(tokenizer):
    return CollateSettings(
        tokenizer_dir=str(tokenizer.directory),
        family=FAMILY,
        pixels=PIXELS,
        sequence_length=512,
        max_image_pixels=10**6,
        supervise={},
        skip_damaged=frozenset(),
    )


def picture(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def caption(name: str, words: str, *images: bytes) -> LoadedSample:
    items = [{"type": "image", "image": number} for number in range(len(images))]
    message = {"role": "text", "content": [*items, {"type": "text", "text": words}]}
    return LoadedSample(Sample(name, "caption", [message]), images, [Image.open(io.BytesIO(i)).size for i in images])


def spec_of(samples, tokenizer, **changes) -> PackSpec:
    lengths = tuple(measure_sample(s.sample, s.sizes, tokenizer, FAMILY).length(s.sizes, PIXELS, FAMILY) for s in samples)
    refs = tuple(SampleRef("src", row, s.sample.id) for row, s in enumerate(samples))
    return replace(PackSpec(4, refs, lengths, (0,) * len(refs), 0, 0), **changes)


def test_a_pack_is_its_samples_side_by_side(tokenizer, config):
    samples = [caption("x", "A red circle", picture(60, 90)), caption("y", "3 blue"), caption("z", "é", picture(56, 28, 1))]
    pack = collate(spec_of(samples, tokenizer), samples, tokenizer, config)
    alone = [collate(spec_of([sample], tokenizer), [sample], tokenizer, config) for sample in samples]
    for name in ("input_ids", "targets", "pixels", "image_facts", "image_tokens", "image_rows"):
        assert np.array_equal(getattr(pack, name), np.concatenate([getattr(one, name) for one in alone])), name
    assert np.array_equal(pack.position_ids, np.concatenate([one.position_ids for one in alone], axis=1))
    assert pack.segment_ends.tolist() == np.cumsum([one.tokens for one in alone]).tolist()
    assert pack.sample_ids == ["x", "y", "z"]
    assert pack.pixels.dtype == np.uint8
    assert len(pack.pixels) == sum(int(np.prod(grid)) for grid in pack.image_facts)


def test_targets_stay_inside_their_segment(tokenizer, config):
    samples = [caption("x", "A red circle", picture(60, 90)), caption("y", "3 blue")]
    pack = collate(spec_of(samples, tokenizer), samples, tokenizer, config)
    start = 0
    for end, sample in zip(pack.segment_ends.tolist(), samples):
        encoded = encode_sample(sample.sample, sample.sizes, tokenizer, FAMILY, PIXELS)
        for place in range(start, end - 1):
            supervised = encoded.supervised[place + 1 - start]
            assert pack.targets[place] == (pack.input_ids[place + 1] if supervised else -100)
        assert pack.targets[end - 1] == -100
        assert pack.input_ids[end - 1] == tokenizer.marks(FAMILY)["end_of_text"]
        start = end


def test_an_empty_pack(tokenizer, config):
    pack = collate(PackSpec(9, (), (), (), 0, -1), [], tokenizer, config)
    assert (pack.tokens, pack.supervised_tokens) == (0, 0)
    assert pack.position_ids.shape == (4, 0)
    assert pack.pixels.shape == (0, 588)
    assert pack.image_facts.shape == (0, 3)


def test_damage_stops_by_name_or_leaves_a_counted_gap(tokenizer, config):
    good, bad = caption("x", "A red circle"), caption("y", "3 blue", picture(56, 56))
    cut = LoadedSample(bad.sample, [bad.images[0][:200]], bad.sizes)
    spec = spec_of([good, bad, good], tokenizer)
    with pytest.raises(DamagedData, match="source src, sample y, image 0"):
        collate(spec, [good, cut, good], tokenizer, config)
    with pytest.raises(DamagedData, match="shard 3"):
        collate(spec, [good, DamagedData("shard 3 is gone"), good], tokenizer, config)
    pack = collate(spec, [good, cut, good], tokenizer, replace(config, skip_damaged=frozenset({"src"})))
    assert pack.damaged == ("src/y",)
    assert pack.sample_ids == ["x", "x"]
    assert pack.segment_ends.tolist() == [good_length := spec.lengths[0], 2 * good_length]


def test_a_changed_length_is_refused(tokenizer, config):
    sample = caption("x", "A red circle")
    spec = spec_of([sample], tokenizer)
    with pytest.raises(DamagedData, match="where the index says"):
        collate(replace(spec, lengths=(spec.lengths[0] + 1,)), [sample], tokenizer, config)


def document(tokenizer) -> LoadedSample:
    images = [picture(56, 56, seed) for seed in range(4)]
    items = []
    for number in range(4):
        items += [{"type": "text", "text": f"Paragraph {number} of red circles.\n" * 3}, {"type": "image", "image": number}]
    sample = Sample("doc", "document", [{"role": "text", "content": items}])
    return LoadedSample(sample, images, [(56, 56)] * 4)


def test_a_split_document_is_all_there(tokenizer, config):
    loaded = document(tokenizer)
    measure = measure_sample(loaded.sample, loaded.sizes, tokenizer, FAMILY)
    total = measure.length(loaded.sizes, PIXELS, FAMILY)
    whole = collate(spec_of([loaded], tokenizer), [loaded], tokenizer, config)
    made = _fitted("split", measure, Sized(loaded.sizes, FAMILY), PIXELS, total // 3, 512)
    assert len(made) >= 3
    ids, patches = [], []
    for length, visual, count, _, start, stop in made:
        ref = (SampleRef("src", 0, "doc"),)
        spec = PackSpec(0, ref, (length,), (visual,), count, 0, spans=((start, stop),))
        piece = collate(spec, [loaded], tokenizer, config)
        assert piece.tokens <= total // 3
        assert piece.position_ids[:, 0].tolist() == [0, 0, 0, 0]
        assert len(piece.pixels) == count
        assert (piece.input_ids == tokenizer.marks(FAMILY)["image"]).sum() == visual
        ids.append(piece.input_ids)
        ends_well = stop == total or tokenizer.decode(piece.input_ids[-1:]).endswith(("\n", "<|vision_end|>"))
        assert ends_well, tokenizer.decode(piece.input_ids[-5:])
        patches.append(piece.pixels)
    assert np.array_equal(np.concatenate(ids), whole.input_ids)
    assert np.array_equal(np.concatenate(patches), whole.pixels)


def test_truncating_never_cuts_an_image(tokenizer, config):
    loaded = document(tokenizer)
    measure = measure_sample(loaded.sample, loaded.sizes, tokenizer, FAMILY)
    total = measure.length(loaded.sizes, PIXELS, FAMILY)
    for limit in range(8, total, 7):
        [(length, visual, count, _, start, stop)] = _fitted("truncate_text", measure, Sized(loaded.sizes, FAMILY), PIXELS, limit, 512)
        assert start == 0
        assert limit - 6 <= length <= limit  # at most an image of four tokens with its marks is lost
        spec = PackSpec(0, (SampleRef("src", 0, "doc"),), (length,), (visual,), count, 0, spans=((0, stop),))
        piece = collate(spec, [loaded], tokenizer, config)
        assert len(piece.pixels) == count == 4 * (piece.input_ids == tokenizer.marks(FAMILY)["image"]).sum()


def test_reduced_resolution_fits_and_is_the_most_that_fits(tokenizer, config):
    sample = caption("x", "A red circle", picture(500, 400))
    measure = measure_sample(sample.sample, sample.sizes, tokenizer, FAMILY)
    bounds = (784, 200_000)
    assert measure.length(sample.sizes, bounds, FAMILY) > 120
    [(length, visual, count, limit, _, stop)] = _fitted("reduce_resolution", measure, Sized(sample.sizes, FAMILY), bounds, 120, 512)
    assert 90 < length <= 120
    assert stop == -1
    spec = PackSpec(0, (SampleRef("src", 0, "x"),), (length,), (visual,), count, 0, pixels_max=(limit,))
    pack = collate(spec, [sample], tokenizer, replace(config, pixels=bounds))
    assert (pack.tokens, len(pack.pixels)) == (length, count)


def test_a_video_brings_both_frames_of_every_patch(tokenizer, config):
    frames = [picture(56, 56, seed) for seed in range(3)]
    clip = {"type": "video", "frames": [0, 1, 2], "timestamps": [0.0, 0.5, 1.0]}
    content = [clip, {"type": "text", "text": "A red circle"}]
    loaded = LoadedSample(Sample("v", "video", [{"role": "text", "content": content}]), frames, [(56, 56)] * 3)
    pack = collate(spec_of([loaded], tokenizer), [loaded], tokenizer, config)
    stills = [caption("i", "x", frame) for frame in frames]
    alone = [collate(spec_of([still], tokenizer), [still], tokenizer, config).pixels for still in stills]
    assert pack.image_facts.tolist() == [[2, 4, 4]]
    assert pack.image_rows.tolist() == [2 * 2 * 16]
    pairs = pack.pixels.reshape(2, 16, 2, 588)
    for turn, (first, second) in enumerate([(0, 1), (2, 2)]):
        assert np.array_equal(pairs[turn, :, 0], alone[first])
        assert np.array_equal(pairs[turn, :, 1], alone[second])
