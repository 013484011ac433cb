"""Which recipe is in force: the spec's, checked beyond what the API server can check, with started stages kept as they were.

Edits of stages that have not started apply. An edit of a started stage that would change its weights is ignored and reported
(condition Accepted, reason EditIgnored); an edit of its layout (workers, checkpoints, failure policy) applies from its next attempt.
The text of a started stage is read back from the recipe ConfigMap of its newest attempt.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import ValidationError

from terrace.cluster import manifests
from terrace.cluster.checks import cluster_problems
from terrace.cluster.cluster_schema import CurriculumSpec
from terrace.errors import InputError
from terrace.recipe import rules
from terrace.recipe.identity import recipe_hash, stage_hash
from terrace.recipe.loading import parse_recipe
from terrace.recipe.schema import Recipe, Source, Stage
from terrace_operator.codec import Memory, decode_memory
from terrace_operator.observe import World

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Accepted:
    """The spec in force, None when nothing may be decided now; `problem` says why."""

    spec: CurriculumSpec | None
    reason: str = "Valid"
    problem: str = ""
    edits_ignored: list[str] = field(default_factory=list)


def accept(curriculum: Manifest, old_status: Manifest, world: World) -> Accepted:
    """Check the spec and merge it with what has started."""
    metadata = curriculum["metadata"]
    spec, problem = _checked_edit((metadata["uid"], metadata.get("generation", 0)), curriculum.get("spec") or {})
    stored = old_status.get("controller") or {}
    started = {stage["name"]: stage for stage in (stored.get("machine") or {}).get("stages", ()) if stage.get("attempt")}
    if not started:
        return Accepted(spec, "Valid" if spec else "InvalidSpec", problem)
    memory = decode_memory(stored)
    if spec is None:
        return _last_good(curriculum["spec"], started, memory, world, metadata["name"], problem)
    key = (metadata["uid"], metadata.get("generation", 0), tuple(sorted(memory.stage_hashes.items())))
    if key in _MERGED:
        return _MERGED[key]
    accepted = _merge(metadata["name"], spec, started, memory, world)
    if accepted.reason == "Valid":  # the other outcomes depend on ConfigMaps that may come back
        _remember(_MERGED, key, accepted)
    return accepted


# A spec is parsed and checked once per edit (about 5 ms), not once per reconcile: (uid, generation) names an edit for ever.
_CHECKED: dict[Any, tuple[CurriculumSpec | None, str]] = {}
_MERGED: dict[Any, Accepted] = {}
MAX_REMEMBERED = 4096


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= MAX_REMEMBERED:
        cache.clear()
    cache[key] = value


def _checked_edit(edit: tuple[str, int], spec: Manifest) -> tuple[CurriculumSpec | None, str]:
    if edit not in _CHECKED:
        _remember(_CHECKED, edit, check(spec))
    return _CHECKED[edit]


def check(raw: Manifest) -> tuple[CurriculumSpec | None, str]:
    """Parsed and semantically checked spec, or None and the problem in words."""
    try:
        spec = CurriculumSpec.model_validate(raw)
        recipe = parse_recipe(raw["recipe"])
    except ValidationError as error:
        first = error.errors()[0]
        return None, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    except (InputError, KeyError) as error:
        return None, str(error)[:1500]
    problems = [str(problem) for problem in rules.check(recipe)] + cluster_problems(spec)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return None, problems[0][:1500] + more
    return with_failure_policy(spec), ""


def with_failure_policy(spec: CurriculumSpec) -> CurriculumSpec:
    """The recipe with the cluster's failure policy over every stage's own."""
    policy = spec.failure_policy
    given = {
        "max_restarts": policy.max_restarts, "max_infrastructure_restarts": policy.max_infra_restarts,
        "backoff_seconds": policy.backoff_seconds, "backoff_cap_seconds": policy.backoff_cap_seconds,
        "stall_timeout_seconds": policy.stall_timeout_seconds,
    }  # fmt: skip
    changes = {key: value for key, value in given.items() if value is not None}
    if not changes:
        return spec
    stages = [stage.model_copy(update={"failure": stage.failure.model_copy(update=changes)}) for stage in spec.recipe.stages]
    return spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"stages": stages})})


def _merge(curriculum: str, spec: CurriculumSpec, started: Manifest, memory: Memory, world: World) -> Accepted:
    names = [stage.name for stage in spec.recipe.stages]
    misplaced = [name for name in started if name not in names or names.index(name) != started[name].get("index")]
    if misplaced:
        problem = f"stages that have started were removed, renamed or moved: {', '.join(misplaced)}"
        return _last_good(spec, started, memory, world, curriculum, problem)
    stages, sources = list(spec.recipe.stages), dict(spec.recipe.data.sources)
    ignored: list[str] = []
    for index, name in enumerate(names):
        known = memory.stage_hashes.get(name)
        if name not in started or known is None:
            continue
        merged_so_far = _with(spec.recipe, stages, sources) if ignored else spec.recipe
        if hash_of(merged_so_far, index) == known:
            continue
        kept = _kept_recipe(curriculum, name, memory, world)
        if kept is None:
            message = f"stage {name} has started and was edited, and the recipe it started with is gone: undo the edit"
            return Accepted(None, "EditRefused", message)
        stages[index] = next(stage for stage in kept.stages if stage.name == name)
        sources |= {source: kept.data.sources[source] for source in stages[index].mixture.weights}
        ignored.append(name)
    if not ignored:
        return Accepted(spec)
    merged = spec.model_copy(update={"recipe": _with(spec.recipe, stages, sources)})
    text = f"the edit of {', '.join(ignored)} is ignored, as it has started; it goes on as it was (rerunFrom takes the edit)"
    return Accepted(merged, "EditIgnored", text, ignored)


def _with(recipe: Recipe, stages: list[Stage], sources: dict[str, Source]) -> Recipe:
    return recipe.model_copy(update={"stages": stages, "data": recipe.data.model_copy(update={"sources": sources})})


def _kept_recipe(curriculum: str, name: str, memory: Memory, world: World) -> Recipe | None:
    """The recipe that the newest attempt of the stage reads."""
    text = world.recipes.get(manifests.recipe_name(curriculum, memory.recipe_maps.get(name, "")))
    return recipe_from_text(text) if text is not None else None


def _last_good(spec: CurriculumSpec | Manifest, started: Manifest, memory: Memory, world: World, curriculum: str, problem: str) -> Accepted:
    """The spec was edited into something that cannot be: the run goes on under the recipe of its newest attempt."""
    newest = max(started.values(), key=lambda stage: stage.get("index", 0))["name"]
    recipe = _kept_recipe(curriculum, newest, memory, world)
    kept = None
    if recipe is not None and isinstance(spec, CurriculumSpec):
        kept = spec.model_copy(update={"recipe": recipe})
    elif recipe is not None:
        with contextlib.suppress(ValidationError):
            kept = CurriculumSpec.model_validate({**spec, "recipe": recipe})
    message = f"the edit is not in force: {problem}; undo it. The run goes on with the recipe it had"
    return Accepted(kept, "EditRefused", message)


@functools.lru_cache(maxsize=1024)
def recipe_from_text(text: str) -> Recipe:
    return parse_recipe(yaml.safe_load(text))


# Hashing a recipe takes a millisecond. The recipe is kept beside its hash, so that its id stays its own.
_HASHES: dict[Any, tuple[Recipe, str]] = {}
_TEXTS: dict[str, str] = {}  # by digest: many Curricula run the same recipe


def hash_of(recipe: Recipe, index: int) -> str:
    """stage_hash of a stage, computed once per parsed recipe."""
    return _hashed((id(recipe), index), recipe, lambda: stage_hash(recipe, index))


def digest_of(recipe: Recipe) -> str:
    """Sixteen characters of recipe_hash, computed once per parsed recipe."""
    return _hashed((id(recipe), "recipe"), recipe, lambda: recipe_hash(recipe)[:16])


def text_of(recipe: Recipe) -> str:
    """The recipe as the pods read it. libyaml writes it ten times as fast as the Python dumper that `terrace` uses for people."""
    digest = digest_of(recipe)
    if digest not in _TEXTS:
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        text = yaml.dump(recipe.model_dump(mode="json"), Dumper=dumper, sort_keys=False, allow_unicode=True)
        _remember(_TEXTS, digest, text)
    return _TEXTS[digest]


def _hashed(key: Any, recipe: Recipe, compute: Callable[[], str]) -> str:
    if key not in _HASHES:
        _remember(_HASHES, key, (recipe, compute()))
    return _HASHES[key][1]
