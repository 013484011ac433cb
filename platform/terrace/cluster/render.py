"""A recipe and a cluster file become one `Curriculum`, checked as far as it can be without a cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from terrace.cluster.checks import cluster_problems
from terrace.cluster.cluster_schema import ClusterSpec, CurriculumSpec
from terrace.cluster.crd import API_VERSION, KIND
from terrace.errors import InputError
from terrace.recipe import rules
from terrace.recipe.loading import dump_recipe
from terrace.recipe.schema import Recipe

Manifest = dict[str, Any]
MAX_NAME = 30


def load_cluster(path: Path) -> ClusterSpec:
    """The cluster file. InputError names every wrong key."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from error
    try:
        return ClusterSpec.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise InputError(f"{path}: " + "; ".join(lines)) from error


def resource_name(recipe: Recipe, name: str | None = None) -> str:
    """Name of the resource: the one given, else the recipe's in lower case. At most 30 of a-z, 0-9 and '-'."""
    if name is None:
        name = re.sub(r"[^a-z0-9-]+", "-", recipe.name.lower()).strip("-")
    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise InputError(f"--name {name!r}: at most {MAX_NAME} of a-z, 0-9 and '-', beginning with a letter")
    return name


def render_curriculum(recipe: Recipe, cluster: ClusterSpec, name: str | None = None, namespace: str | None = None) -> Manifest:
    """The resource. InputError where the operator would refuse it."""
    spec = CurriculumSpec.model_validate({**cluster.model_dump(), "recipe": recipe})
    problems = [str(problem) for problem in rules.check(recipe)] + cluster_problems(spec)
    if problems:
        raise InputError("\n".join(problems))
    metadata: Manifest = {"name": resource_name(recipe, name)}
    if namespace:
        metadata["namespace"] = namespace
    body = cluster.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    return {
        "apiVersion": API_VERSION, "kind": KIND, "metadata": metadata,
        "spec": {"recipe": yaml.safe_load(dump_recipe(recipe)), **body},
    }  # fmt: skip


def to_yaml(body: Manifest) -> str:
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=120)
