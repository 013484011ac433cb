"""The hashes of runs and stages: what moves them, what does not, and the defaults that they rest on.

`python tests/unit/test_recipe_identity.py` adds the defaults of new fields to recipe_defaults.json; it never changes one.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from terrace.recipe.identity import recipe_hash, stage_hash
from terrace.recipe.schema import Recipe

FILE = Path(__file__).with_name("recipe_defaults.json")
TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"


def defaults() -> dict[str, Any]:
    """`Section.field` -> its default, of every section that a recipe can hold."""
    found: dict[str, Any] = {}
    waiting, seen = [Recipe], {Recipe}
    while waiting:
        section = waiting.pop()
        for name, field in section.model_fields.items():
            if field.default is not PydanticUndefined:
                value = field.default
                found[f"{section.__name__}.{name}"] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            for inner in _sections(field.annotation):
                if inner not in seen:
                    seen.add(inner)
                    waiting.append(inner)
    return json.loads(json.dumps(found))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in _sections(part)]


def test_no_default_has_changed_its_value():
    """A recipe that leaves a field out would train something else under the same hash: give the new meaning a new name instead."""
    pinned, now = json.loads(FILE.read_text()), defaults()
    assert len(pinned) > 150
    assert {name: now.get(name, "gone") for name, value in pinned.items() if name not in now or not _same(value, now[name])} == {}


def _same(pinned: Any, now: Any) -> bool:
    """A section's own default may gain fields: theirs are pinned by themselves."""
    if isinstance(pinned, dict) and isinstance(now, dict):
        return all(name in now and _same(value, now[name]) for name, value in pinned.items())
    return bool(pinned == now)


def tiny(**stage: Any) -> Recipe:
    values = yaml.safe_load(TINY.read_text())
    values["stages"][0] |= stage
    return Recipe.model_validate(values)


def test_writing_out_a_default_changes_no_hash():
    plain = tiny()
    first = plain.stages[0]
    written = tiny(
        loss_chunk_tokens=first.loss_chunk_tokens,
        optimizer=first.optimizer.model_dump(),
        seed=0,
        final_precision="auto",
        data_loading=first.data_loading.model_dump(),
        schedule=first.schedule.model_dump(),
        ema=None,
    )
    assert recipe_hash(written) == recipe_hash(plain)
    assert stage_hash(written, 0) == stage_hash(plain, 0)


@pytest.mark.parametrize(
    ("change", "moves"),
    [({"data_loading": {"engine": "inline", "prefetch_packs": 3}}, False), ({"data_loading": {"window_samples": 77}}, True),
     ({"seed": 1}, True), ({"checkpoint": {"every_steps": 3}}, False), ({"parallel": {"strategy": "zero2"}}, False),
     ({"final_precision": "bf16"}, True), ({"ema": {}}, True)],
)  # fmt: skip
def test_what_moves_the_hash_of_a_stage(change: dict[str, Any], moves: bool):
    given = yaml.safe_load(TINY.read_text())["stages"][0]
    merged = {name: {**given.get(name, {}), **value} if isinstance(value, dict) else value for name, value in change.items()}
    changed = tiny(**merged)
    assert (stage_hash(changed, 0) != stage_hash(tiny(), 0)) == moves
    assert recipe_hash(changed) != recipe_hash(tiny())
    assert (stage_hash(changed, 1) != stage_hash(tiny(), 1)) == moves, "a stage rests on the ones before it"


if __name__ == "__main__":
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    FILE.write_text(json.dumps({**defaults(), **known}, indent=0, sort_keys=True) + "\n")
