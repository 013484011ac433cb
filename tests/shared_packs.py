"""Two stages whose packs several ranks share, and what makes two runs of them the same."""

from __future__ import annotations

import numpy as np
from packs import ALL_PARTS, tiny_recipe
from ranks import losses, stage_dir

from terrace.models.weights import Directory
from terrace.recipe.schema import Recipe


def recipe_of(strategy: str, size: int, **changes) -> Recipe:
    """A frozen-language stage, then all parts with recomputed activations; steps without images and odd lengths.

    The epsilon is above the rounding of a sum: AdamW would divide a gradient of 1e-9, all rounding, by itself and move the weight by it.
    """
    common = {
        "parallel": {"strategy": strategy, "sequence_parallel": size}, "batch": {"packs": 2}, "optimizer": {"eps": 1e-6}, **changes,
    }  # fmt: skip
    everything = {**ALL_PARTS, "language": {"lr": 1e-3, "activation_checkpointing": True}}
    return tiny_recipe([
        {"name": "warm", "train": {"projector": {"lr": 1e-3}}, "budget": {"steps": 2}, **common},
        {"name": "all", "train": everything, "budget": {"steps": 3}, **common},
    ])


def weights(folder):
    directory = Directory(folder / "final")
    return {name: directory.read(name) for name in sorted(directory.names)}


def assert_same_run(ours, reference, rtol=1e-5, weight_tolerance=5e-5):
    for index in (0, 1):
        np.testing.assert_allclose(losses(ours, index), losses(reference, index), rtol=rtol)
    found, expected = weights(stage_dir(ours, 1)), weights(stage_dir(reference, 1))
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) < weight_tolerance, name


def values_of(recipe: Recipe) -> dict:
    return recipe.model_dump(mode="json")
