"""Writes the table of systems into docs/families.md from the recipes themselves: `python tests/recipe_table.py docs/families.md`.

System and source are the first line of a recipe's comment, family, stages and objectives are the recipe's, and how sure a recipe is
are the words "assumed", "borrowed" and "recalled" beside its values, counted with those of what it extends. A family that no recipe
has stands with the curriculum that all families are taken through (test_family_stages.py).
"""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from pathlib import Path

from families import NAMES, QUICK
from tiny_recipes import FAST
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from terrace.recipe.changes import stage_model
from terrace.recipe.loading import lines_in_use, load_recipe
from terrace.recipe.schema import Recipe, Stage
from terrace.recipe.schema_model import Model
from terrace.recipe.shipped import names, shipped_file

OWN = ("clicking", "demo", "demo-encoder-to-morl", "demo-morl", "five-tasks-morl", "sft")  # of no published system
PUBLISHED = tuple(name for name in names() if name not in OWN)
OTHER_CLASSES = {"vit": "ViTModel", "vit_mae": "ViTMAEForPreTraining", "bert": "BertForMaskedLM"}  # of pictures, or of text, alone
BEGIN, END = "<!-- recipes: written by `make docs` from the recipes -->", "<!-- /recipes -->"
SURE = ("assumed", "borrowed", "recalled")
TRAINS = {"vision": "V", "projector": "P", "language": "L"}
HEAD = """\
| system | family | stages (what trains) | objective | recipe | tiny test | parity reference | how sure |
|---|---|---|---|---|---|---|---|"""


def table() -> str:
    """The table as Markdown."""
    return "\n".join([HEAD, *map(row, PUBLISHED), *map(row_of_family, without_recipe())])


def row(name: str) -> str:
    recipe = load_recipe(name)
    stages = "; ".join(map(stage_words, recipe.stages))
    cells = (
        heading(name)[0], f"`{last_model(recipe).architecture}`", stages, objectives(recipe), f"`{name}`", where(name in FAST),
        parity(recipe), sureness(name, recipe),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def without_recipe() -> list[str]:
    """Families that write text and end no shipped curriculum."""
    taken = {last_model(load_recipe(name)).architecture for name in names()}
    return [name for name in NAMES if name not in taken]


def row_of_family(name: str) -> str:
    """Stages and objectives are those of test_family_stages.py, whatever the system's own are."""
    stages, learn = "warm (P); all (VPL); judge (VPL); morl (L); compare (VPL)", "lm x2; reward_model; grpo; mpo"
    return f"| the family alone | `{name}` | {stages} | {learn} | none | {where(name in QUICK)} | {class_of(name)} | no published values |"


def where(fast: bool) -> str:
    return "`make test`" if fast else "`make test-all`"


def heading(name: str) -> tuple[str, str]:
    """(system, what the recipe is and its source) of the first line."""
    system, _, rest = text_of(name).split("\n", 1)[0].removeprefix("# ").partition(": ")
    return system, rest


def stage_words(stage: Stage) -> str:
    """`alignment (VP)`."""
    letters = "".join(letter for part, letter in TRAINS.items() if getattr(stage.train, part))
    return f"{stage.name} ({letters})"


def objectives(recipe: Recipe) -> str:
    """Of the stages in turn: `lm x2; dpo`."""
    runs = [(name, len(list(run))) for name, run in itertools.groupby(stage.objective for stage in recipe.stages)]
    return "; ".join(name if count == 1 else f"{name} x{count}" for name, count in runs)


def last_model(recipe: Recipe) -> Model:
    """What the curriculum ends with."""
    return stage_model(recipe, len(recipe.stages) - 1)


def parity(recipe: Recipe) -> str:
    """What the model is compared with: transformers' class of its family, or formulas that the tests write out."""
    model = last_model(recipe)
    if model.connector is None:
        return class_of(model.architecture)
    config = model.config or {}
    experts = (" and visual expert" if config.get("visual_expert") else "") + (" and experts" if config.get("experts") else "")
    return f"{model.connector.kind}{experts}, written out"


def class_of(architecture: str) -> str:
    """Of transformers, or the formula where it has none with that loss."""
    spelt = architecture.replace("blip_2", "blip-2")
    found = CLASSES.get(spelt) or OTHER_CLASSES.get(architecture)
    return f"`{found}`" if found else "formula"


def sureness(name: str, recipe: Recipe) -> str:
    """Values in use that are marked, and whether a part stands in; nothing marked: all as published."""
    counts: Counter[str] = Counter()
    for file, line in lines_in_use(name):
        comment = Path(file).read_text(encoding="utf-8").split("\n")[line - 1].partition(" #")[2]
        counts.update(word for word in SURE if re.search(rf"\b{word}\b", comment))
    words = [f"{counts[word]} {word}" for word in SURE if counts[word]]
    return ", ".join([*words, *(["part stands in"] if recipe.model.stands_in_for else [])]) or "as published"


def text_of(name: str) -> str:
    path = shipped_file(name)
    assert path is not None, name
    return path.read_text(encoding="utf-8")


def filled(page: str) -> str:
    """The page with its table between the two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
