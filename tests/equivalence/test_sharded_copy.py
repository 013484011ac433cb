"""A rollout engine whose weights are in shards: what a whole copy says, on ranks that decode different prompts, or none."""

from __future__ import annotations

import pytest
import torch

from terrace.errors import TerraceError
from terrace.generation.copies import EngineOnCopy, light_copy
from terrace.generation.interface import Sampling
from terrace.generation.native import NativeEngine
from terrace.generation.sharded_weights import ShardedWeights
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.worker.context import WorkerContext

from decoding import PROMPTS, decoding_model, prompt_of  # isort: skip
from packs import IMAGE_PAD, VIDEO_PAD  # isort: skip
from thread_ranks import run_threads  # isort: skip

FORBIDDEN, STOP = (IMAGE_PAD, VIDEO_PAD), range(0, 512, 10)
SAMPLING = Sampling(samples=3, max_tokens=12, seed=8)


@pytest.fixture(scope="module")
def model():
    return decoding_model()


def sharded_engine(model, rank: int, ranks: int, precision: str = "fp32") -> tuple[EngineOnCopy, ShardedWeights]:
    copy = light_copy(model.config, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    weights = ShardedWeights(copy, WorkerContext(rank=rank, world_size=ranks, local_rank=rank))
    use_shared_prompt_attention(copy, "sdpa_segments")
    return EngineOnCopy(weights, NativeEngine(copy, FORBIDDEN, STOP, "cpu", precision), stays=False), weights


def bytes_held(weights: ShardedWeights) -> int:
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in weights.model.parameters()}
    parts = [stretch.part.untyped_storage().nbytes() for layer in weights._layers for stretch in layer.stretches]
    return sum(storages.values()) + sum(parts)


def answers(groups) -> list:
    return [[(one.tokens.tolist(), one.logprobs.tolist(), one.finished) for one in group] for group in groups]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranks_in_step_say_what_each_would_say_with_whole_weights(model, precision):
    """Rank r of 3 has its own prompts, of other lengths and numbers of pictures; the last has none. Twice, as iterations do."""
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    mine = [PROMPTS[:1], [*PROMPTS[1:], prompt_of(3, [])], []]

    def work(rank: int, ranks: int):
        engine, weights = sharded_engine(model, rank, ranks, precision)
        found, held = [], [bytes_held(weights)]
        for version in (1, 2):
            engine.update_weights(lambda: ((name, value.to(engine.precisions[name])) for name, value in tensors.items()), version)
            held.append(bytes_held(weights))
            with engine.together():
                found.append(answers(engine.generate(mine[rank], SAMPLING)) if mine[rank] else [])
            held.append(bytes_held(weights))
            engine.sleep()
            held.append(bytes_held(weights))
        return found, held, sum(value.numel() * engine.precisions[name].itemsize for name, value in tensors.items())

    with torch.no_grad():
        for rank, (found, held, whole) in enumerate(run_threads(3, work)):
            expected = []
            if mine[rank]:
                reference = NativeEngine(model, FORBIDDEN, STOP, "cpu", precision)
                reference._short_step = lambda: None  # shards are decoded as transformers' layers do
                expected = answers(reference.generate(mine[rank], SAMPLING))
            assert found == [expected, expected]
            assert held[0] == held[3] == held[6] == 0
            assert held[1] == held[2] == held[4] == held[5] <= 0.45 * whole  # a third, norms and what fills up


def test_an_error_on_one_rank_ends_all(model):
    """None waits for a collective that never comes."""
    tensors = {name: value.detach() for name, value in model.named_parameters()}

    def work(rank: int, ranks: int):
        engine, _ = sharded_engine(model, rank, ranks)
        engine.update_weights(lambda: iter(tensors.items()))
        try:
            with engine.together():
                if rank == 1:
                    raise ValueError("a prompt of rank 1")
                engine.generate(PROMPTS, SAMPLING)
        except (ValueError, TerraceError) as error:
            return str(error)
        return ""

    first, second, third = run_threads(3, work)
    assert second == "a prompt of rank 1"
    assert first == third
    assert "see that rank's error" in first


def test_a_rank_does_not_decode_alone(model):
    def work(rank: int, ranks: int):
        engine, _ = sharded_engine(model, rank, ranks)
        engine.update_weights(lambda: ((name, value.detach()) for name, value in model.named_parameters()))
        with pytest.raises(TerraceError, match="on all ranks together"):
            engine.generate(PROMPTS[:1], SAMPLING)

    run_threads(2, work)
