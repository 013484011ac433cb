"""A real vLLM on a CPU: its answers, log-probabilities and weights are those of the native engine and of the trainer."""

from __future__ import annotations

import numpy as np
import pytest
from vllm_world import World, in_another_order, mismatch, said, said_by_transformers, world_of

from terrace.generation.interface import Sampling

pytestmark = pytest.mark.vllm
GREEDY = Sampling(samples=1, max_tokens=24, temperature=0.0)
LARGEST_MISMATCH = 1e-4
FAMILIES = ("qwen2_5_vl", "qwen3_vl")  # those that vLLM was seen to decode


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_weights(name, tmp_path, in_this_process, capsys):
    """One engine through its life: greedy answers, sampling, new weights, and the same pictures again."""
    world = world_of(name, tmp_path)
    first, second = world.model(1), world.model(2)
    assert len(world.never) > 1024, "more than vLLM takes as biases"
    figures = {}
    with world.vllm() as engine:
        engine.update_weights(lambda: first.named_parameters())
        arrived = []
        answers = engine.generate(world.prompts, GREEDY, lambda place, group: arrived.append(place))
        assert said(answers) == said(world.native(first).generate(world.prompts, GREEDY))
        assert said(answers) == said_by_transformers(world, first, GREEDY.max_tokens)
        assert sorted(arrived) == list(range(len(world.prompts)))
        for temperature in (1.0, 0.7):
            sampling = Sampling(samples=6, max_tokens=24, temperature=temperature, seed=5)
            groups = engine.generate(world.prompts, sampling)
            figures[f"T={temperature}"] = check_sampled(world, first, groups, sampling)
            again = engine.generate(in_another_order(world.prompts), sampling)
            assert said(again)[::-1] == said(groups), "whatever else is in the batch"
        nucleus = engine.generate(world.prompts, Sampling(samples=2, max_tokens=8, top_p=0.8))
        assert all(np.isnan(response.logprobs).all() for group in nucleus for response in group)
        figures["update"] = check_update(world, engine, second, said(answers))
        check_update(world, engine, first, said(world.native(second).generate(world.prompts, GREEDY)))
    with world.vllm() as fresh:
        fresh.update_weights(lambda: second.named_parameters())
        assert said(fresh.generate(world.prompts, GREEDY)) == said(world.native(second).generate(world.prompts, GREEDY))
    with capsys.disabled():
        print(f"\n{name}: largest |log-probability of vLLM - of the trainer|: {figures}")


def check_sampled(world: World, model, groups, sampling: Sampling) -> float:
    responses = [response for group in groups for response in group]
    assert len({tuple(response.tokens.tolist()) for response in responses}) > len(responses) // 2
    assert not any(np.isin(response.tokens, world.never).any() for response in responses)
    assert all((int(response.tokens[-1]) in world.stop) == response.finished for response in responses)
    found = mismatch(world, model, groups, sampling)
    assert found < LARGEST_MISMATCH
    return found


def check_update(world: World, engine, model, before) -> float:
    """New weights in place, then the same pictures: the answers and log-probabilities of the new weights alone."""
    engine.sleep()
    engine.update_weights(lambda: model.named_parameters())
    engine.wake()
    answers = engine.generate(world.prompts, GREEDY)
    assert said(answers) == said(world.native(model).generate(world.prompts, GREEDY))
    assert said(answers) != before, "an update that changes nothing shows nothing"
    sampling = Sampling(samples=4, max_tokens=24, seed=6)
    return check_sampled(world, model, engine.generate(world.prompts, sampling), sampling)
