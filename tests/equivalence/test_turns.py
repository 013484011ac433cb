"""Conversations of several turns: encoding, decoding with what is kept, and what trains of them, on tiny models in fp32."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import NAMES, case_of, conversation, model_of, picture

from terrace.data.prompt import read_observation, read_prompt
from terrace.data.template import encode_prompt
from terrace.data.types import Sample, next_positions
from terrace.errors import InputError
from terrace.generation.interface import Prompt, Sampling
from terrace.generation.native import NativeEngine
from terrace.generation.tokens import forbidden_tokens, stop_tokens
from terrace.generation.turns import converse
from terrace.generation.turns_cache import TurnsCache
from terrace.models.families.interface import FamilyModel
from terrace.models.families.registry import family_model_named
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.objectives.grpo import PolicyOptions, summed_policy_loss
from terrace.rl.units import TrainGroup, policy_batch

QUICK = ("qwen2_5_vl", "llava")
ALONE = {  # families that cannot read an observation, or none with a picture, and what they say
    "gemma3": "both ways", "llava_onevision": "when one more comes", "paligemma": "one question and its answer",
    "blip_2": "one question and its answer", **dict.fromkeys(("idefics", "flamingo", "mllama"), "observe in text alone"),
}  # fmt: skip


def talk_of(case, number: int, sizes, more: bool = True):
    """A question with pictures, an answer, and an observation, with one more picture if wanted."""
    loaded = conversation(number, sizes)
    messages = [loaded.sample.messages[0], {"role": "assistant", "content": [{"type": "text", "text": "left"}]}]
    observed = {"role": "user", "content": [{"type": "image", "image": len(sizes)}, {"type": "text", "text": "missed, again"}]}
    size = (60 + 7 * number, 48)
    if not more:
        observed["content"].pop(0)
        return Sample(f"s{number}", "prompt", [*messages, observed]), loaded.images, sizes
    sample = Sample(f"s{number}", "prompt", [*messages, observed])
    return sample, [*loaded.images, picture(*size, seed=90 + number)], [*sizes, size]


class World:
    """Reacts with `talk_of`'s observation for as many turns as (place + sample) says."""

    def __init__(self, case, prompts) -> None:
        self.case, self.prompts = case, prompts
        self.following = {}
        self.turns = {}
        self.more = True  # pictures

    def __call__(self, place: int, sample: int, answer):
        key, future = (place, sample), Future()
        turn = self.turns[key] = self.turns.get(key, 0) + 1
        before = self.following.get(key, self.prompts[place].next_positions) + len(answer.tokens)
        if turn > (place + sample) % 3:
            future.set_result(None)
            return future
        talk, images, sizes = talk_of(self.case, place, [(50, 70)] * (place % 2 + 1), self.more)
        try:
            seen = read_observation(talk, images, sizes, self.case.tokenizer, self.case.family, self.case.pixels, before)
        except InputError as error:
            future.set_exception(error)
            return future
        self.following[key] = next_positions(seen.positions)
        future.set_result(seen)
        return future


def prompts_of(case, count: int) -> list[Prompt]:
    made = []
    for number in range(count):
        loaded = conversation(number, [(50, 70)] * (number % 2 + 1))
        read = read_prompt(loaded.sample, loaded.images, loaded.sizes, case.tokenizer, case.family, case.pixels)
        made.append(Prompt(**vars(read.inputs), key=("prompts", number), id=f"prompt-{number}", task="task"))
    return made


class Plain:
    """The engine without a `converse` of its own."""

    def __init__(self, engine: NativeEngine) -> None:
        self.generate = engine.generate


def test_what_no_family_can_be_shown_is_refused_by_name(tmp_path_factory):
    for name, said in ALONE.items():
        case = case_of(name, tmp_path_factory.getbasetemp())
        with pytest.raises(InputError, match=said):
            read_observation(
                *talk_of(case, 1, [(50, 70)]), case.tokenizer, case.family, case.pixels, np.zeros(case.family.position_rows, np.int64)
            )
    two_ways = {name for name in NAMES if type(family_model_named(name)).groups is not FamilyModel.groups}
    assert two_ways <= set(ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["idefics", "mllama"])
def test_pictures_beside_the_text_stay_those_of_the_prompt(name, tmp_path_factory):
    """Observations in text: what was sampled has the log-probabilities of one pass over the conversation, answers side by side or alone."""
    case = case_of(name, tmp_path_factory.getbasetemp())
    torch.set_num_threads(1)
    model = model_of(case)
    use_shared_prompt_attention(model, "sdpa_segments")
    forbidden = forbidden_tokens(case.tokenizer, case.config)
    stop = [token for token in (*range(0, 400, 9), *stop_tokens(case.tokenizer, case.config)) if token not in forbidden]
    engine = NativeEngine(model, forbidden, stop, "cpu", "fp32", max_rows=6)
    prompts, world = prompts_of(case, 3), World(case, [])
    world.prompts, world.more = prompts, False
    kept = converse(engine, prompts, Sampling(samples=3, max_tokens=12, temperature=0.7, seed=5), world, lambda place, group: None)
    assert {len(one.observed.sampled) > int(one.observed.sampled.sum()) for group in kept for one in group} == {True, False}
    groups = [TrainGroup(prompt, tuple(group), (1.0, -0.5, 0.25)) for prompt, group in zip(prompts, kept)]
    batch = policy_batch(groups, "cpu", torch.float32)
    summed_policy_loss(model, batch, PolicyOptions(temperature=0.7, forbidden=forbidden, chunk_tokens=16))
    sampled = np.concatenate([one.sampled_logprobs for group in kept for one in group])
    assert np.abs(batch.results["logprobs"].detach().numpy() - sampled).max() < 1e-4


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES if n not in ALONE])
def test_conversations(name, tmp_path_factory, monkeypatch):
    case = case_of(name, tmp_path_factory.getbasetemp())
    # Encoded in parts it is the conversation encoded as a whole, ids, positions and pixels.
    sample, images, sizes = talk_of(case, 1, [(50, 70), (90, 40)])
    asked = replace(sample, messages=sample.messages[:1])
    begun = read_prompt(asked, images[:-1], sizes[:-1], case.tokenizer, case.family, case.pixels).inputs
    whole = read_prompt(sample, images, sizes, case.tokenizer, case.family, case.pixels)
    again = replace(sample, messages=[*sample.messages, sample.messages[1]])
    answered = encode_prompt(again, sizes, case.tokenizer, case.family, case.pixels)
    assert np.array_equal(answered.input_ids, whole.inputs.input_ids)
    mark, start = case.tokenizer.marks(case.family)[case.family.end_of_turn], len(begun.input_ids)
    end = start + int(np.flatnonzero(whole.inputs.input_ids[start:] == mark)[0]) + 1
    following = next_positions(whole.inputs.positions[:, :end])
    rest = read_observation(sample, images, sizes, case.tokenizer, case.family, case.pixels, following)
    assert np.array_equal(rest.input_ids, whole.inputs.input_ids[end:])
    assert np.array_equal(rest.positions, whole.inputs.positions[:, end:])
    assert np.array_equal(np.concatenate([begun.pixels, rest.pixels]), whole.inputs.pixels)
    assert np.array_equal(begun.input_ids, whole.inputs.input_ids[: len(begun.input_ids)])

    # Decoded with what is kept, it is what decoding from the whole conversation gives each turn.
    torch.set_num_threads(1)
    model = model_of(case)
    use_shared_prompt_attention(model, "sdpa_segments")
    forbidden = forbidden_tokens(case.tokenizer, case.config)
    stop = [token for token in (*range(0, 400, 9), *stop_tokens(case.tokenizer, case.config)) if token not in forbidden]
    engine = NativeEngine(model, forbidden, stop, "cpu", "fp32", max_rows=6)
    prompts, sampling = prompts_of(case, 3), Sampling(samples=3, max_tokens=12, temperature=0.7, seed=5)
    caches, heard = [], []
    made = TurnsCache.__init__
    monkeypatch.setattr(TurnsCache, "__init__", lambda self, *given: (made(self, *given), caches.append(self))[0])
    kept = converse(engine, prompts, sampling, World(case, prompts), lambda place, group: heard.append(place))
    again = converse(Plain(engine), prompts, sampling, World(case, prompts), lambda place, group: None)
    assert sorted(heard) == [0, 1, 2]
    turns = set()
    for one, other in zip((r for group in kept for r in group), (r for group in again for r in group)):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert np.array_equal(one.observed.sampled, other.observed.sampled)
        assert one.observed.sampled[-1]
        assert np.nanmax(np.abs(one.logprobs - other.logprobs)) < 1e-5
        assert np.array_equal(np.isnan(one.logprobs), ~one.observed.sampled)
        assert np.array_equal(one.observed.inputs.positions, other.observed.inputs.positions)
        turns.add(len(one.observed.inputs.image_tokens))
    assert turns == {0, 1, 2}
    # Every token behind a prompt was computed once (the last of a conversation is never fed), and every prompt once.
    assert sum(cache.tokens_fed for cache in caches) == sum(len(r.tokens) - 1 for group in kept for r in group)

    # What trains: exactly the sampled tokens, with the log-probabilities of one pass over the final conversation.
    groups = [TrainGroup(prompt, tuple(group), (1.0, -0.5, 0.25)) for prompt, group in zip(prompts, kept)]
    batch = policy_batch(groups, "cpu", torch.float32)
    responses = [r for group in kept for r in group]
    assert batch.tokens.tolist() == [int(t) for r in responses for t in r.tokens[r.observed.sampled]]
    assert int(batch.lengths.sum()) == sum(group.response_tokens for group in groups) < sum(len(r.tokens) for r in responses)
    options = PolicyOptions(temperature=0.7, forbidden=forbidden, chunk_tokens=16)
    loss = summed_policy_loss(model, batch, options)
    logprobs = batch.results["logprobs"].numpy()
    assert np.abs(logprobs - np.concatenate([r.sampled_logprobs for r in responses])).max() < 1e-4
    loss.backward()
    shared = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0.0
    for group in groups:  # each conversation alone, unshared
        for response, advantage in zip(group.responses, group.advantages):
            single = policy_batch([TrainGroup(group.prompt, (response,), (advantage,))], "cpu", torch.float32)
            one = summed_policy_loss(model, single, options)
            one.backward()
            total += one.item()
    assert abs(total - loss.item()) < 1e-3
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, shared[key], atol=2e-4, rtol=1e-3), key
    model.zero_grad()
