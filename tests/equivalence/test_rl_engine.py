"""Decoding and the shared prompt against transformers and the unshared computation, on a tiny random model in fp32."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from terrace.errors import TerraceError
from terrace.generation.copies import EngineOnCopy, WholeWeights, light_copy
from terrace.generation.interface import Prompt, Response, Sampling, uniforms
from terrace.generation.native import NativeEngine
from terrace.generation.separate import as_bytes, from_bytes
from terrace.models.attention import attention
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.objectives.grpo import PolicyOptions, summed_policy_loss
from terrace.rl.units import TrainGroup, pack_groups, policy_batch

from decoding import PROMPTS, decoding_model  # isort: skip
from packs import IMAGE_PAD, VIDEO_PAD, reference_images  # isort: skip

STOP = 502
FORBIDDEN = (IMAGE_PAD, VIDEO_PAD)


@pytest.fixture(scope="module")
def model():
    return decoding_model()


def engine_of(model, stop=(STOP,), **changes) -> NativeEngine:
    return NativeEngine(model, FORBIDDEN, stop, "cpu", "fp32", **changes)


def generated_by_transformers(model, prompt: Prompt, tokens: int) -> list[int]:
    inputs = {
        "input_ids": torch.from_numpy(prompt.input_ids).long()[None],
        "mm_token_type_ids": torch.from_numpy((prompt.input_ids == IMAGE_PAD).astype(np.int64))[None],
    }
    inputs |= reference_images(prompt)
    with attention(model, "sdpa"), torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            suppress_tokens=list(FORBIDDEN),
            eos_token_id=STOP,
            pad_token_id=0,
        )
    use_shared_prompt_attention(model, "sdpa_segments")
    return out[0, len(prompt.input_ids) :].tolist()


def test_greedy_tokens_equal_transformers_generate(model):
    groups = engine_of(model).generate(PROMPTS, Sampling(samples=2, max_tokens=24, temperature=0))
    for prompt, group in zip(PROMPTS, groups):
        expected = generated_by_transformers(model, prompt, 24)
        for response in group:
            assert response.tokens.tolist() == expected
            assert response.finished == (expected[-1] == STOP)


def test_engine_logprobs_equal_the_trainers(model):
    sampling = Sampling(samples=4, max_tokens=20, temperature=0.7, seed=3)
    groups = engine_of(model, stop=range(0, 512, 10)).generate(PROMPTS, sampling)
    lengths = {len(response.tokens) for group in groups for response in group}
    assert len(lengths) > 1, "the test wants responses of different lengths"
    trained = [TrainGroup(prompt, tuple(group), (1.0,) * 4) for prompt, group in zip(PROMPTS, groups)]
    batch = policy_batch(trained, "cpu", torch.float32)
    with torch.no_grad():
        summed_policy_loss(model, batch, PolicyOptions(temperature=0.7, forbidden=FORBIDDEN, chunk_tokens=16))
    engine = np.concatenate([response.logprobs for group in groups for response in group])
    assert np.abs(batch.results["logprobs"].numpy() - engine).max() < 1e-4
    assert not np.isin(batch.tokens.numpy(), FORBIDDEN).any()


def test_a_response_does_not_depend_on_its_batch(model):
    sampling = Sampling(samples=4, max_tokens=16, seed=11)
    stop = range(0, 512, 10)
    together = engine_of(model, stop).generate(PROMPTS, sampling)
    alone = [engine_of(model, stop).generate([prompt], sampling)[0] for prompt in PROMPTS]
    waves = engine_of(model, stop, max_rows=4).generate(PROMPTS, sampling)
    for first, second, third in zip(together, alone, waves):
        for a, b, c in zip(first, second, third):
            assert a.tokens.tolist() == b.tokens.tolist() == c.tokens.tolist()
    texts = {tuple(response.tokens.tolist()) for group in together for response in group}
    assert len(texts) == 12
    other = engine_of(model, stop).generate(PROMPTS, Sampling(samples=4, max_tokens=16, seed=12))
    assert other[0][0].tokens.tolist() != together[0][0].tokens.tolist()


def test_a_prompt_whose_samples_end_with_their_first_token_leaves_the_others_theirs(model):
    """It leaves the batch before any step has been decoded, when there are keys of prompts but none of responses."""
    sampling = Sampling(samples=1, max_tokens=6, temperature=0)
    first = [int(group[0].tokens[0]) for group in engine_of(model).generate(PROMPTS, dataclasses.replace(sampling, max_tokens=1))]
    assert len(set(first)) > 1, "the test wants prompts that are answered differently"
    for stop in set(first):
        together = engine_of(model, [stop]).generate(PROMPTS, sampling)
        alone = [engine_of(model, [stop]).generate([prompt], sampling)[0] for prompt in PROMPTS]
        assert {1} < {len(group[0].tokens) for group in together}
        for a, b in zip(alone, together, strict=True):
            assert a[0].tokens.tolist() == b[0].tokens.tolist()
            assert np.abs(a[0].logprobs - b[0].logprobs).max() < 1e-5


def test_a_place_that_is_free_is_taken_by_the_next_prompt(model):
    """Many short and a few long responses in four rows: tokens of each alone, fewer steps than in waves, none asked for too early."""
    prompts = [dataclasses.replace(PROMPTS[number % 3], key=("prompts", number)) for number in range(9)]
    sampling, stop = Sampling(samples=2, max_tokens=40, seed=21), range(0, 512, 25)
    alone = [engine_of(model, stop).generate([prompt], sampling)[0] for prompt in prompts]
    lengths = [len(response.tokens) for group in alone for response in group]
    assert min(lengths) < 10 < 30 < max(lengths)
    engine, asked, arrived, state = engine_of(model, stop, max_rows=4), [], [], {"pauses": 0}

    def as_needed():
        for number, prompt in enumerate(prompts):
            if number == 5 and state["pauses"] < 3:  # none for now
                state["pauses"] += 1
                yield None
            asked.append(len(arrived))
            yield prompt

    groups = engine.generate(as_needed(), sampling, lambda place, group: arrived.append(place))
    for expected, group in zip(alone, groups, strict=True):
        for a, b in zip(expected, group):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert np.abs(a.logprobs - b.logprobs).max() < 1e-5
            assert a.finished == b.finished
    assert sorted(arrived) == list(range(9)) != arrived
    assert asked[:2] == [0, 0]
    assert asked[-1] >= 5, "prompts were asked for when rows were free"
    used, waves = engine.usage.taken(), engine_of(model, stop, max_rows=4)
    for start in range(0, 9, 2):
        waves.generate(prompts[start : start + 2], sampling)
    assert used.capacity == 4
    assert used.live_steps == waves.usage.live_steps
    assert used.steps < 0.8 * waves.usage.steps
    assert used.idle_share < waves.usage.idle_share
    stopped: list[int] = []
    some = engine.generate(prompts, sampling, lambda place, group: stopped.append(place), stop=lambda: len(stopped) >= 3)
    assert 3 <= len(some) < 9
    for place, group in zip(sorted(stopped), some):
        assert [one.tokens.tolist() for one in group] == [one.tokens.tolist() for one in alone[place]]


def test_weights_are_replaced_between_two_steps_and_tokens_say_by_which_they_were_sampled(model):
    engine, before = engine_of(model, stop=()), {name: value.clone() for name, value in model.state_dict().items()}
    sampling, steps = Sampling(samples=2, max_tokens=12, seed=5), []

    def exchange() -> None:
        with engine.replacing(7), torch.no_grad():
            steps.append(len(heard))
            model.lm_head.weight.copy_(model.lm_head.weight.flip(0))

    heard: list[int] = []
    thread = threading.Thread(target=exchange)

    def hear(*_):
        heard.append(1)
        if len(heard) == 8:
            thread.start()

    try:
        [group] = engine.generate(PROMPTS[:1], sampling, heard=hear)
        thread.join()
    finally:
        model.load_state_dict(before)
    [expected] = engine_of(model, stop=()).generate(PROMPTS[:1], sampling)
    for response, old in zip(group, expected):
        first = int((response.versions == 0).sum())
        assert response.versions.tolist() == [0] * first + [7] * (12 - first)
        assert first == steps[0] // 2 >= 4
        assert response.tokens[:first].tolist() == old.tokens[:first].tolist()
        assert response.tokens.tolist() != old.tokens.tolist()


def test_a_copy_in_the_engine_s_precision_says_what_the_model_says(model):
    """In bf16, what linear layers read is handed over and kept in two bytes: token for token and bit for bit the same answers."""
    copy_of = light_copy(model.config, torch.bfloat16)
    weights = WholeWeights(copy_of, "cpu")
    use_shared_prompt_attention(copy_of, "sdpa_segments")
    copied = EngineOnCopy(weights, NativeEngine(copy_of, FORBIDDEN, range(0, 512, 10), "cpu", "bf16"))
    names = {str(dtype).removeprefix("torch.") for dtype in copied.precisions.values()}
    assert names == {"bfloat16", "float32"}
    assert copied.precisions["lm_head.weight"] == torch.bfloat16
    assert copied.precisions["model.language_model.embed_tokens.weight"] == torch.float32
    bits = {
        name: as_bytes(value.detach(), str(copied.precisions[name]).removeprefix("torch.")) for name, value in model.named_parameters()
    }
    assert sum(one.nbytes for one in bits.values()) < 0.8 * sum(4 * value.numel() for value in model.parameters())
    copied.update_weights(lambda: ((name, from_bytes(one)) for name, one in bits.items()), 3)
    sampling = Sampling(samples=3, max_tokens=16, seed=8)
    expected = NativeEngine(model, FORBIDDEN, range(0, 512, 10), "cpu", "bf16").generate(PROMPTS, sampling)
    for one, other in zip(expected, copied.generate(PROMPTS, sampling)):
        for a, b in zip(one, other):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.logprobs.tolist() == b.logprobs.tolist()
            assert set(b.versions.tolist()) == {3}


def test_a_copy_beside_a_training_model_is_there_only_while_it_generates(model):
    """Its memory is given back when it sleeps; made anew it says the same, and a hand-over that leaves a tensor out is refused."""
    copy_of = light_copy(model.config, torch.float32)
    whole = WholeWeights(copy_of, "cpu")
    use_shared_prompt_attention(copy_of, "sdpa_segments")
    copied = EngineOnCopy(whole, NativeEngine(copy_of, FORBIDDEN, (), "cpu", "fp32"), stays=False)
    sampling, held = Sampling(samples=2, max_tokens=8, seed=8), {}

    def bytes_held() -> int:
        return sum(parameter.untyped_storage().nbytes() for parameter in copy_of.parameters())

    assert bytes_held() == 0
    weights = {name: value.detach() for name, value in model.named_parameters()}
    for version in (1, 2):
        copied.update_weights(lambda: iter(weights.items()), version)
        copied.wake()
        assert bytes_held() == sum(4 * value.numel() for value in weights.values())
        held[version] = copied.generate(PROMPTS, sampling)
        copied.sleep()
        assert bytes_held() == 0
    expected = engine_of(model, stop=()).generate(PROMPTS, sampling)
    for groups in held.values():
        for one, other in zip(expected, groups, strict=True):
            assert [a.tokens.tolist() for a in one] == [b.tokens.tolist() for b in other]
            assert [a.logprobs.tolist() for a in one] == [b.logprobs.tolist() for b in other]
    with pytest.raises(TerraceError, match=r"got no weights for 1 tensors, such as lm_head\.weight"):
        copied.update_weights(lambda: ((name, value) for name, value in weights.items() if name != "lm_head.weight"), 3)


def test_a_complete_group_is_handed_on_while_others_decode(model, monkeypatch):
    """So that rewards are computed meanwhile; and every group is handed on once, as it is returned."""
    engine, steps, arrived = engine_of(model, stop=range(0, 512, 4)), [], []
    decode = engine._decode
    monkeypatch.setattr(engine, "_decode", lambda *arguments: steps.append(1) or decode(*arguments))
    sampling = Sampling(samples=2, max_tokens=24, seed=4)
    groups = engine.generate(PROMPTS, sampling, lambda place, group: arrived.append((len(steps), place, group)))
    assert sorted(place for _, place, _ in arrived) == [0, 1, 2]
    assert min(when for when, _, _ in arrived) < len(steps)
    for _, place, group in arrived:
        assert [response.tokens.tolist() for response in group] == [response.tokens.tolist() for response in groups[place]]


def test_samples_follow_the_distribution(model):
    """The first token of 4,000 samples of a prompt against its probabilities, whole and with top_p."""
    prompt, samples = PROMPTS[1], 4000
    logits = first_logits(model, prompt)
    for top_p in (1.0, 0.6):
        sampling = Sampling(samples=samples, max_tokens=1, temperature=1.5, top_p=top_p, seed=1)
        group = engine_of(model, max_rows=samples).generate([prompt], sampling)[0]
        counts = np.bincount([int(response.tokens[0]) for response in group], minlength=len(logits))
        expected = np.exp(logits / 1.5 - np.logaddexp.reduce(logits / 1.5))
        if top_p < 1:
            order = np.argsort(-expected)
            before = np.cumsum(expected[order]) - expected[order]
            expected[order[before >= top_p]] = 0
            expected /= expected.sum()
        assert counts[expected == 0].sum() == 0
        spread = np.sqrt(samples * expected * (1 - expected)) + 1e-9
        assert (np.abs(counts - samples * expected) <= 5 * spread + 1).all()


def first_logits(model, prompt: Prompt) -> np.ndarray:
    """Float64 [V] after the prompt, media tokens at -inf."""
    tokens = np.array([1], np.int32)
    group = TrainGroup(prompt, (Response(tokens, np.zeros(1, np.float32), False),), (1.0,))
    batch = policy_batch([group], "cpu", torch.float32)
    from terrace.models.shared_prompt import units_hidden

    with torch.no_grad():
        logits = model.lm_head(units_hidden(model, batch.batch, batch.units)[-1]).double().numpy()
    logits[list(FORBIDDEN)] = -np.inf
    return logits


def test_uniforms_are_reproducible_and_differ():
    first = PROMPTS[0]
    assert uniforms(1, first, 3, 4).tolist() == uniforms(1, first, 3, 4).tolist()
    assert uniforms(1, first, 3, 4)[:2].tolist() == uniforms(1, first, 3, 2).tolist()
    again = dataclasses.replace(first, occurrence=1)
    assert len({uniforms(s, p, g, 1)[0] for s in range(3) for p in [*PROMPTS, again] for g in range(3)}) == 36


def random_groups() -> list[TrainGroup]:
    rng = np.random.default_rng(5)
    groups = []
    for number, prompt in enumerate(PROMPTS):
        lengths = [1, 7, 12] if number != 1 else [5, 5, 5]
        responses = tuple(
            Response(rng.integers(0, 500, length).astype(np.int32), np.zeros(length, np.float32), True)
            for length in lengths
        )
        groups.append(TrainGroup(prompt, responses, tuple(rng.normal(size=3).tolist())))
    return groups


def loss_and_gradients(model, packs, options) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for pack in packs:
        loss = summed_policy_loss(model, policy_batch(pack, "cpu", torch.float32), options)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk_tokens", [1024, 8])
def test_shared_prompt_equals_unshared_loss_and_gradients(model, chunk_tokens):
    options = PolicyOptions(forbidden=FORBIDDEN, entropy_coefficient=0.1, chunk_tokens=chunk_tokens)
    groups = random_groups()
    unshared = [
        [TrainGroup(group.prompt, (response,), (advantage,))]
        for group in groups
        for response, advantage in zip(group.responses, group.advantages)
    ]
    expected_loss, expected = loss_and_gradients(model, unshared, options)
    assert len(pack_groups(groups, 10_000)) == 1
    halves = pack_groups(groups, groups[0].rows - 1)  # the first group alone is too long: its prompt is computed twice
    assert [group.prompt.id for pack in halves for group in pack].count("prompt-0") == 2
    for packs in (pack_groups(groups, 10_000), halves, pack_groups(groups, 1)):
        loss, gradients = loss_and_gradients(model, packs, options)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            scale = float(expected[name].abs().max())
            assert float((gradient - expected[name]).abs().max()) <= 2e-5 * max(scale, 1e-3), name
    model.zero_grad(set_to_none=True)


def test_responses_do_not_see_each_other(model):
    """Changing one response leaves the other's log-probabilities bit for bit the same."""
    groups = random_groups()
    first = groups[0]
    changed = TrainGroup(
        first.prompt, (first.responses[0], first.responses[1], groups[1].responses[0]), first.advantages
    )
    results = []
    for group in (first, changed):
        batch = policy_batch([group], "cpu", torch.float32)
        with torch.no_grad():
            summed_policy_loss(model, batch, PolicyOptions())
        results.append(batch.results["logprobs"][:8])
    assert float((results[0] - results[1]).abs().max()) < 1e-6
