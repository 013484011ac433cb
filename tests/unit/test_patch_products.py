"""A patch embedding multiplies instead of convolving: the same numbers, gradients and names."""

from __future__ import annotations

import copy

import pytest
import torch
from packs import tiny_recipe

from terrace.models.build import meta_model, model_config
from terrace.models.patch_products import PatchProduct, as_products


def conv(**options: object) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv3d(3, 9, (2, 4, 4), **{"stride": (2, 4, 4), **options}))


@pytest.mark.parametrize("bias", [True, False])
def test_it_gives_the_numbers_and_gradients_of_the_convolution(bias):
    plain, products = conv(bias=bias), conv(bias=bias)
    assert as_products(products) == 1
    assert list(products.state_dict()) == list(plain.state_dict())
    patches = torch.randn(5, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for model in (plain, products, copy.deepcopy(products)):
        rows = patches.clone().requires_grad_()
        out = model(rows)
        assert out.shape == (5, 9, 1, 1, 1)
        out.square().sum().backward()
        results.append([out.detach(), rows.grad, *(parameter.grad for parameter in model.parameters())])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_products_are_of_matrices(monkeypatch):
    products = conv()
    as_products(products)
    monkeypatch.setattr(torch.nn.functional, "conv3d", lambda *_: pytest.fail("it convolved"))
    assert products(torch.ones(2, 3, 2, 4, 4)).shape == (2, 9, 1, 1, 1)


def test_an_input_of_several_patches_is_convolved():
    plain, products = conv(), conv()
    as_products(products)
    video = torch.randn(1, 3, 4, 8, 8)
    torch.testing.assert_close(products(video), plain(video))


@pytest.mark.parametrize("options", [{"padding": 1}, {"dilation": (1, 2, 2)}, {"stride": (1, 4, 4)}, {"groups": 3}])
def test_a_convolution_that_is_no_product_stays_one(options):
    model = conv(**options)
    assert as_products(model) == 0
    assert type(model[0]) is torch.nn.Conv3d


def test_every_model_of_the_qwen_kind_has_it():
    config = model_config(tiny_recipe().model)
    embedded = [module for module in meta_model(config).modules() if isinstance(module, torch.nn.Conv3d)]
    assert embedded
    assert all(type(module) is PatchProduct for module in embedded)
