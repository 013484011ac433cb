"""Muon shared over ranks: the weights of every rank stepping everything, to the bit; momentum on one rank each, moved to other ranks."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from thread_ranks import run_threads

from terrace.recipe.schema import Stage
from terrace.train import matrix_shares
from terrace.train.matrix_shares import MatrixShares, shared_out
from terrace.train.optimizer import ParameterGroup
from terrace.train.optimizers import OPTIMIZER_KINDS, Kind, Optimizers

STAGE = Stage.model_validate({
    "name": "one", "train": {"language": {"lr": 0.01}}, "mixture": {"a": 1.0}, "sequence_length": 64, "budget": {"steps": 9},
    "batch": {"packs": 2}, "optimizer": {"kind": "muon"}, "ema": {"decay": 0.9},
})  # fmt: skip
SHAPES = {f"layer.{n}.{kind}": shape for n in range(3) for kind, shape in (("up", (24, 8)), ("down", (8, 24)), ("mix", (8, 8)))}
GROUPS = [
    ParameterGroup("language", 0, 0.01, 0.1, tuple(name for name in SHAPES if "layer.0" not in name), "muon"),
    ParameterGroup("language", 1, 0.02, 0.0, tuple(name for name in SHAPES if "layer.0" in name), "muon"),
    ParameterGroup("language", 1, 0.02, 0.0, ("norm",), "adamw"),
]


def parameters() -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in (SHAPES | {"norm": (8,)}).items()}


def stepped(rank: int, ranks: int, steps: range, state: dict[Kind, dict[str, torch.Tensor]] | None, weights: dict | None = None) -> tuple:
    """(weights, state by kind, averages) of a rank after steps with gradients that all ranks have alike."""
    held = parameters()
    for name, tensor in (weights or {}).items():
        held[name].data.copy_(tensor)
    shares = MatrixShares(rank, shared_out(SHAPES, ranks) if ranks > 1 else {})
    optimizers = Optimizers(STAGE, GROUPS, held, lambda tensor: (0, tensor.view(-1)), shares)
    if state is not None:
        optimizers.load(lambda kind: lambda name: state[kind][name], dict.fromkeys(held, steps.start))
    for step in steps:
        draw = torch.Generator().manual_seed(100 + step)
        for name in sorted(held):
            held[name].grad = torch.randn(held[name].shape, generator=draw)
        optimizers.step([(0.01, 0.1), (0.02, 0.0), (0.02, 0.0)])
        assert all(parameter.grad is None for parameter in held.values()), "other ranks' matrices keep no gradients either"
    assert optimizers.steps() == dict.fromkeys(held, steps.stop)
    kept = {kind: {name: tensor.clone() for name, tensor in optimizers.tensors(kind)} for kind in OPTIMIZER_KINDS}
    return {name: tensor.detach().clone() for name, tensor in held.items()}, kept, dict(optimizers.tensors("average"))


def joined(results: list[tuple]) -> dict[Kind, dict[str, torch.Tensor]]:
    """The state of all ranks; each matrix's momentum is on one of them."""
    count = Counter(name for _, kept, _ in results for name in kept["momentum_buffer"])
    assert set(count) == set(SHAPES)
    assert set(count.values()) == {1}
    return {kind: {name: tensor for _, kept, _ in results for name, tensor in kept[kind].items()} for kind in OPTIMIZER_KINDS}


@pytest.mark.parametrize("bucket", [1, 200, matrix_shares.BUCKET_NUMBERS])
def test_the_weights_are_those_of_every_rank_stepping_everything_and_momentum_moves_to_other_ranks(bucket):
    with mock.patch.object(matrix_shares, "BUCKET_NUMBERS", bucket):
        whole = stepped(0, 1, range(6), None)
        before = run_threads(3, lambda rank, ranks: stepped(rank, ranks, range(4), None))
        state = joined(before)
        for ranks in (1, 2, 12):  # 12: some have no matrix
            after = run_threads(ranks, lambda rank, ranks: stepped(rank, ranks, range(4, 6), state, before[2][0]))
            for weights, _, _ in after:
                assert all(torch.equal(weights[name], tensor) for name, tensor in whole[0].items())
            for kind, tensors in joined(after).items():
                assert all(torch.equal(tensors[name], tensor) for name, tensor in whole[1][kind].items())
        six = run_threads(2, lambda rank, ranks: stepped(rank, ranks, range(6), None))
        for _, _, averages in six:
            assert all(torch.equal(averages[name], tensor) for name, tensor in whole[2].items())


def test_a_matrix_that_lies_across_its_memory_arrives():
    def work(rank: int, ranks: int) -> torch.Tensor:
        across = torch.full((3, 5), float(rank)).t()
        MatrixShares(rank, {"across": 1}).exchange({"across": across})
        return across

    assert all(torch.equal(across, torch.ones(5, 3)) for across in run_threads(3, work))


@pytest.mark.parametrize("seed", range(20))
def test_no_rank_has_more_than_its_share_and_one_matrix(seed):
    draw = random.Random(seed)
    shapes = {f"m{n}": (draw.randint(1, 4000), draw.randint(1, 4000)) for n in range(draw.randint(1, 60))}
    ranks = draw.choice([1, 2, 3, 8, 64])
    owners = shared_out(shapes, ranks)
    assert shared_out(dict(reversed(shapes.items())), ranks) == owners, "every rank finds the same, in whatever order it has them"
    costs = {name: min(shape) ** 2 * (2 * max(shape) + min(shape)) for name, shape in shapes.items()}
    load = [sum(costs[name] for name, owner in owners.items() if owner == rank) for rank in range(ranks)]
    assert max(load) <= sum(load) / ranks + max(costs.values())
