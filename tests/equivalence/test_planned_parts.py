"""What is added to a model of parts (adapters, visual experts, slices), as the planner counts it: FLOPs and activations of real steps."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted import ADAPTED
from families import CONFIGS, SIGLIP, Case, case_of
from measured import activations, flops
from middle_families import MIDDLE_TOWER

from terrace.families.registry import make_family
from terrace.models.build import model_config
from terrace.recipe.schema import PARTS, Model

SLICES = CONFIGS["terrace_vlm_any_size"]
ADDED = {
    **ADAPTED, "visual_expert": {"visual_expert": True},
    "bucketed_slices": {
        "pictures": {"scale": 84, "positions": "bucketed", "text": "marked"}, "connector": SLICES["connector"] | {"positions": "keys"},
        "vision_config": SLICES["vision_config"] | SIGLIP | {"image_size": 140}, "vision_feature_layer": -1,
    },
    "eva_clip_g": {
        "vision_variant": "eva_clip_g", "vision_feature_layer": -1, "connector": {"kind": "q_former", "queries": 5, "width": 64},
    },
    "eva2_clip_e": {"vision_variant": "eva2_clip_e", "vision_feature_layer": -1, "connector": {"kind": "glu", "width": 96}},
    "growing_square": {"pictures": {"layout": "square", "scale": 84}, "connector": {"kind": "mlp", "layers": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("tokenizers")


def added_case(name: str, folder, middle: bool = False) -> Case:
    """`middle`: of a size at which activations outweigh what a plan rounds away."""
    architecture = "terrace_vlm_any_size" if "pictures" in ADDED[name] else "terrace_vlm"
    values = copy.deepcopy(CONFIGS[architecture] | ADDED[name])
    if middle:
        side = {"image_size": 112} if architecture == "terrace_vlm" else {}
        values["vision_config"] |= MIDDLE_TOWER | side
        values["text_config"] |= {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
        if name == "modality_adapters":
            values |= {"modality_adapters": {"rank": 8, "groups": 2, "temperature": 10.0}}
            values["connector"] = {"kind": "class_tokens", "every": 1, "width": 64}
    small = case_of(architecture, folder)
    section = Model.model_validate({"architecture": architecture, "config": values})
    family, pixels = small.tokenizer.fit(make_family(architecture, section.config or {})), (1, 4 * 84**2)
    return Case(architecture, section, family, small.tokenizer, model_config(section, small.tokenizer), pixels)


@pytest.mark.parametrize(
    "trained",
    [pytest.param(("projector",), marks=pytest.mark.slow), pytest.param(("vision", "language"), marks=pytest.mark.slow), tuple(PARTS)],
    ids="+".join,
)
@pytest.mark.parametrize("name", ADDED)
def test_flops_are_those_of_the_flop_counter(name, trained, folder, monkeypatch):
    load, visual_tokens, found = flops(added_case(name, folder), trained, monkeypatch)
    assert load.visual_tokens == visual_tokens or name == "modality_adapters"
    for counted, planned in found:
        assert counted == pytest.approx(planned, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", [("projector",), ("vision", "projector"), tuple(PARTS)], ids="+".join)
@pytest.mark.parametrize("name", ADDED)
def test_activations_are_what_autograd_saves(name, trained, checkpointing, folder, monkeypatch):
    measured, planned = activations(added_case(name, folder, middle=True), trained, checkpointing, monkeypatch)
    assert measured == pytest.approx(planned, rel=0.1)
