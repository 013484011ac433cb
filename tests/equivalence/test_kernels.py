"""Fused norms and gates take the place of transformers' own without changing a number or a name."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from packs import random_pack, tiny_recipe

from terrace.errors import InputError
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, model_config
from terrace.models.forward import pack_logits_hidden
from terrace.models.kernels import choose_kernels, use_liger


@pytest.fixture
def stand_in(monkeypatch):
    """liger_kernel's two functions in PyTorch (it runs on CUDA only), with its own signatures; counts its calls."""
    calls = {"norm": 0, "gate": 0}

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        calls["norm"] += 1
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return W * (X.float() * torch.rsqrt(X.float().pow(2).mean(-1, keepdim=True) + eps)).to(X.dtype)

    def liger_swiglu(a, b):
        calls["gate"] += 1
        return F.silu(a) * b

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_rms_norm, functional.liger_swiglu = liger_rms_norm, liger_swiglu
    for name, module in {
        "liger_kernel": ModuleType("liger_kernel"), "liger_kernel.transformers": ModuleType("liger_kernel.transformers"),
        "liger_kernel.transformers.functional": functional,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_the_model_computes_the_same_with_fused_kernels(stand_in):
    recipe = tiny_recipe()
    batch = to_device(random_pack(3), "cpu", torch.float32)
    logits, gradients, names = [], [], []
    for fused in (False, True):
        model = build_model(recipe.model, model_config(recipe.model))
        use_attention(model, "sdpa_segments")
        if fused:
            # two language layers with two norms each and the last one; two vision blocks likewise and the projector's
            assert use_liger(model) == (5 + 5, 4)
        out = pack_logits_hidden(model, batch)[0]
        out.square().mean().backward()
        logits.append(out.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        names.append([name for name, _ in model.named_parameters()])
    assert stand_in == {"norm": 10, "gate": 4}
    assert names[0] == names[1]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_kernels_are_chosen_by_capability_and_refused_by_name(monkeypatch):
    found = importlib.util.find_spec
    assert choose_kernels("auto", "cpu")[0] == "torch"
    assert choose_kernels("torch", "cuda") == ("torch", "named by the recipe")
    for installed, chosen in ((object(), "liger"), (None, "torch")):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest, spec=installed: spec if name == "liger_kernel" else found(name, *rest)
        )
        assert choose_kernels("auto", "cuda")[0] == chosen
    with pytest.raises(InputError, match="pip install liger-kernel"):
        choose_kernels("liger", "cuda")
    with pytest.raises(InputError, match="needs a CUDA device"):
        choose_kernels("liger", "cpu")
