"""Rules about the model and the tokenizer: sources of weights that exclude each other, and shapes that cannot be built.

A configuration is transformers' own map; which of its fields must be written and how they fit, the family says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from terrace.errors import InputError
from terrace.families.interface import Family, Finding
from terrace.families.registry import family_class
from terrace.recipe.changes import stage_model
from terrace.recipe.errors import Path, Problem
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.rules_places import written_models
from terrace.recipe.schema import PARTS, Recipe, Stage
from terrace.recipe.schema_inputs import Tokenizer
from terrace.recipe.schema_model import Model


def check(recipe: Recipe) -> Iterator[Problem]:
    tokenizer = recipe.tokenizer
    if (tokenizer.path is None) == (tokenizer.train_vocabulary_size is None):
        found = "has both" if tokenizer.path is not None else "needs one of"
        yield Problem(("tokenizer",), f"{found} `path` and `train_vocabulary_size`; give exactly one")
    for at, model in written_models(recipe):
        yield from check_model(model, tokenizer, at)
    for index, stage in enumerate(recipe.stages):
        try:
            model = stage_model(recipe, index)
            family = family_class(model.architecture)
        except InputError:
            continue  # said above
        yield from _stage(stage, family, _unshared(model, family), ("stages", index))


def check_model(model: Model, tokenizer: Tokenizer, at: Path) -> Iterator[Problem]:
    """What is wrong with one model by itself; `at` is its key."""
    if (model.config is None) == (model.pretrained is None):
        found = "`config` and `pretrained` exclude each other" if model.config is not None else "needs `config` or `pretrained`"
        yield Problem(at, f"{found}; give exactly one")
    if model.init is not None and model.pretrained is not None:
        yield Problem((*at, "init"), "only adds weights to a `config`; `pretrained` brings all of them")
    try:
        family = family_class(model.architecture)
    except InputError as error:
        yield Problem((*at, "architecture"), str(error).removeprefix("model.architecture: "))
        return
    if model.connector is not None and model.config is None:
        yield Problem((*at, "connector"), "stands in a `config`; `pretrained` brings its own")
    if model.connector is not None and not family.connects:
        told = "has its own; the architectures terrace_vlm and terrace_vlm_any_size take the recipe's"
        yield Problem((*at, "connector"), f"{family.name} {told}")
    if model.config is not None:
        trained = tokenizer.train_vocabulary_size is not None
        yield from _config(model.config, family, at, trained_tokenizer=trained, recipe_says=model.connector is not None)


def _unshared(model: Model, family: type[Family]) -> str:
    """Why ranks cannot share a pack of the model, which its configuration may decide; empty: they can."""
    try:
        return family.of(model.config or {}).unshared
    except (InputError, TypeError, ValueError, AttributeError):
        return ""  # a configuration that is wrong, which is said where it is checked


def _stage(stage: Stage, family: type[Family], unshared: str, at: Path) -> Iterator[Problem]:
    """What the family cannot do in a stage."""
    if (reason := family.refused_objectives.get(stage.objective)) is not None:
        yield Problem((*at, "objective"), f"{stage.objective} cannot train a {family.name} here: {reason}")
    for part in PARTS:
        if part in family.untrained and getattr(stage.train, part) is not None:
            yield Problem((*at, "train", part), f"the {part} of a {family.name} never trains: no gradient comes through what it gives")
        if part not in family.parts and getattr(stage.train, part) is not None:
            yield Problem((*at, "train", part), f"{family.name} has no part {part}; it has {' and '.join(family.parts)}")
    if stage.grpo is not None and stage.grpo.engine == "vllm" and not family.whole_pictures:
        told = f"vllm cannot answer for {family.name}, whose tiles cannot be given back as whole pictures; choose native"
        yield Problem((*at, "grpo", "engine"), told)
    if stage.parallel.sequence_parallel > 1 and unshared:
        yield Problem((*at, "parallel", "sequence_parallel"), f"ranks cannot share a pack of {family.name}: {unshared}")
    if stage.parallel.sequence_exchange == "ring" and family.looks_ahead:
        told = f"a {family.name} has tokens that see later ones, which a ring does not pass on; use heads"
        yield Problem((*at, "parallel", "sequence_exchange"), told)
    if stage.z_loss and stage.objective != "lm":
        yield Problem((*at, "z_loss"), f"is part of the objective lm; this stage's objective is {stage.objective}")
    if not stage.expert_balance:
        return
    key = (*at, "expert_balance")
    if not family.experts:
        yield Problem(key, f"{family.name} has no experts to spread tokens over; leave it out")
    elif not OBJECTIVES[stage.objective].balances:
        able = ", ".join(name for name, entry in OBJECTIVES.items() if entry.balances)
        yield Problem(key, f"is part of the objectives {able}; this stage's objective is {stage.objective}")
    elif stage.train.language is None:
        yield Problem(key, "moves the routers of the language model, which is frozen in this stage; leave it out, or train `language`")


def _config(config: dict[str, Any], family: type[Family], at: Path, trained_tokenizer: bool, recipe_says: bool) -> Iterator[Problem]:
    """`recipe_says`: the connector in `config` was written as `model.connector`."""
    if config.get("model_type", family.name) != family.name:
        yield Problem((*at, "config", "model_type"), f"`{config['model_type']}` is not model.architecture `{family.name}`")
    for path, message in _findings(config, family, trained_tokenizer):
        written = path[:1] == ("connector",) and recipe_says
        yield Problem((*at, *path) if written else (*at, "config", *path), message)


def _findings(config: dict[str, Any], family: type[Family], trained_tokenizer: bool) -> Iterator[Finding]:
    """What the family finds wrong. The configuration is free of form, so a value may be of a kind that no check expects."""
    try:
        yield from family.check(config, trained_tokenizer)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        yield (), f"holds a value of another kind than family {family.name} reads ({error})"
