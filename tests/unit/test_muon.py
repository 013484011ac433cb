"""Muon is torch's, bit for bit where its products are bf16; a matrix gets the same whatever stands beside it."""

from __future__ import annotations

import pytest
import torch

from terrace.train import muon
from terrace.train.muon import Muon, orthogonalise

SHAPES = [(34, 20), (20, 34), (34, 20), (20, 20), (40, 8), (16, 16), (34, 20), (16, 16), (20, 20), (20, 20)]
COEFFICIENTS, STEPS, EPSILON = (3.4445, -4.7750, 2.0315), 5, 1e-7


def matrices(shapes: list[tuple[int, int]], seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def groups(weights: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": weights[:3], "lr": 0.02, "weight_decay": 0.1}, {"params": weights[3:], "lr": 0.01, "weight_decay": 0.0}]


def after(kind: type[torch.optim.Optimizer], steps: int) -> list[torch.Tensor]:
    """The weights and momenta after some steps along known gradients; the last matrix has none in the second step."""
    weights = matrices(SHAPES)
    optimizer = kind(groups(weights), lr=0.0, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for step in range(steps):
        for weight, gradient in zip(weights, matrices(SHAPES, seed=step + 1), strict=True):
            weight.grad = gradient.detach() + 0.1 * weight.detach()
        if step == 1:
            weights[-1].grad = None
        optimizer.step()
    return [*(weight.detach() for weight in weights), *(optimizer.state[weight]["momentum_buffer"] for weight in weights)]


def test_it_is_torchs_muon_bit_for_bit(monkeypatch):
    monkeypatch.setattr(muon, "products_in", lambda device: torch.bfloat16)
    for ours, theirs in zip(after(Muon, 4), after(torch.optim.Muon, 4), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(after(Muon, 4)[0], after(Muon, 3)[0])


def test_without_bf16_instructions_products_are_float32(monkeypatch):
    """Within bf16's rounding of torch's, and nearer to the same in float64."""
    monkeypatch.setattr(muon, "products_in", lambda device: torch.float32)
    for ours, theirs in zip(after(Muon, 3), after(torch.optim.Muon, 3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
    x = matrices([(34, 20)])[0].detach()
    exact = orthogonalise(x.double(), COEFFICIENTS, STEPS, EPSILON)
    torch.testing.assert_close(orthogonalise(x, COEFFICIENTS, STEPS, EPSILON).double(), exact, rtol=0, atol=1e-5)


def test_where_products_are_bf16(monkeypatch):
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        muon.products_in.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert muon.products_in("cpu") == expected
        assert muon.products_in("cuda") == torch.bfloat16
    muon.products_in.cache_clear()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_directions_stay_and_singular_values_come_near_one(shape):
    x = matrices([shape])[0].detach().double()
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalise(x, COEFFICIENTS, STEPS, EPSILON)
    inner = u.mT @ found @ vh.mT
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-9)
    values = inner.diagonal()
    assert values.min() > 0.6
    assert values.max() < 1.3  # as published: nearly all between 0.7 and 1.2


@pytest.mark.parametrize(("numbers", "together"), [(1, {1}), (2 * 20 * 20, {1, 2}), (2**22, {1, 2, 3})])
def test_a_matrix_gets_the_same_bits_beside_any_others(numbers, together, monkeypatch):
    expected = after(Muon, 3)
    monkeypatch.setattr(muon, "BATCH_NUMBERS", numbers)
    sizes: set[int] = set()
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: sizes.add(len(tensors)) or stack(tensors))
    for here, there in zip(after(Muon, 3), expected, strict=True):
        assert torch.equal(here, there)
    assert sizes == together  # in groups of their own: two of 34 x 20, three of 20 x 20


def test_a_closure_is_refused():
    weights = matrices([(4, 4)])
    with pytest.raises(ValueError, match="takes no closure"):
        Muon(weights, adjust_lr_fn="match_rms_adamw").step(lambda: 0.0)


@pytest.mark.parametrize("other", [{"nesterov": False}, {"adjust_lr_fn": "original"}])
def test_options_that_it_does_not_have_are_refused(other):
    with pytest.raises(ValueError, match="match_rms_adamw"):
        Muon(matrices([(4, 4)]), **{"adjust_lr_fn": "match_rms_adamw", **other})


def test_only_the_updates_of_one_batch_are_held(monkeypatch):
    """Else a step would hold a copy of all matrices."""
    monkeypatch.setattr(muon, "BATCH_NUMBERS", 1)
    made, asked, lerp, whole = [], [], torch.Tensor.lerp, muon.orthogonalise
    monkeypatch.setattr(torch.Tensor, "lerp", lambda *args: made.append(1) or lerp(*args))
    monkeypatch.setattr(muon, "orthogonalise", lambda *args: asked.append(len(made)) or whole(*args))
    after(Muon, 1)
    assert asked == list(range(1, len(SHAPES) + 1))
