"""The committed reference is the schema's, every field is described, and the editor schema accepts the shipped recipes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from terrace.recipe.loading import load_recipe
from terrace.recipe.reference import recipe_json_schema, recipe_reference
from terrace.recipe.schema import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted([*REPOSITORY.glob("jobs/recipes/*.yaml"), *REPOSITORY.glob("tests/recipes/*.yaml")])


def test_the_committed_reference_is_current() -> None:
    written = (REPOSITORY / "docs" / "recipe-reference.md").read_text(encoding="utf-8")
    assert written == recipe_reference(), "run: python -m terrace.recipe.reference docs/recipe-reference.md"


def test_every_field_is_described() -> None:
    schema = Recipe.model_json_schema()

    def bare(name: str, model: dict[str, Any]) -> list[str]:
        return [f"{name}.{field}" for field, value in model.get("properties", {}).items() if "description" not in value]

    assert [item for name, model in {"Recipe": schema, **schema["$defs"]}.items() for item in bare(name, model)] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_validate(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.stages


@cache
def editor_schema() -> jsonschema.Draft202012Validator:
    schema = recipe_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_editor_schema_accepts_shipped_recipes(path: Path) -> None:
    editor_schema().validate(_numbers(yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)))


def test_the_editor_schema_refuses_an_unknown_key() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"extends": "demo.yaml", "modell": {}}, recipe_json_schema())


def _numbers(value: Any) -> Any:
    """What the plain yaml module reads as text although it is a number (300e9)."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
