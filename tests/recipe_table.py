"""Writes the table of published systems into docs/recipes.md from the recipes themselves: `python tests/recipe_table.py docs/recipes.md`.

System and source are the first line of a recipe's comment, family, stages and objectives are the recipe's, and how sure a recipe is
are the words "assumed", "borrowed" and "recalled" beside its values, counted with those of what it extends.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from tiny_recipes import FAST
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from terrace.recipe.changes import stage_model
from terrace.recipe.loading import lines_in_use, load_recipe
from terrace.recipe.schema import Recipe, Stage
from terrace.recipe.schema_model import Model
from terrace.recipe.shipped import names, shipped_file

OWN = ("clicking", "demo", "demo-encoder-to-morl", "demo-morl", "five-tasks-morl", "sft")  # of no published system
PUBLISHED = tuple(name for name in names() if name not in OWN)
ENCODERS = {"vit": "ViTModel", "vit_mae": "ViTMAEForPreTraining"}  # of pictures alone
BEGIN, END = "<!-- recipes: written by `make docs` from the recipes -->", "<!-- /recipes -->"
SURE = ("assumed", "borrowed", "recalled")
TRAINS = {"vision": "V", "projector": "P", "language": "L"}
HEAD = """\
| system | recipe | family | stages (what trains) | parity reference | tiny test | how sure |
|---|---|---|---|---|---|---|"""


def table() -> str:
    """The table as Markdown."""
    return "\n".join([HEAD, *map(row, PUBLISHED)])


def row(name: str) -> str:
    recipe = load_recipe(name)
    stages = "; ".join(stage_words(stage) for stage in recipe.stages)
    tested = "`make test`" if name in FAST else "`make test-all`"
    cells = (heading(name)[0], f"`{name}`", f"`{last_model(recipe).architecture}`", stages, parity(recipe), tested, sureness(name, recipe))
    return f"| {' | '.join(cells)} |"


def heading(name: str) -> tuple[str, str]:
    """(system, what the recipe is and its source) of the first line."""
    system, _, rest = text_of(name).split("\n", 1)[0].removeprefix("# ").partition(": ")
    return system, rest


def stage_words(stage: Stage) -> str:
    """`alignment (VP)`, with the objective where it is not the language model's own."""
    letters = "".join(letter for part, letter in TRAINS.items() if getattr(stage.train, part))
    return f"{stage.name} ({letters}{'' if stage.objective == 'lm' else f', {stage.objective}'})"


def last_model(recipe: Recipe) -> Model:
    """What the curriculum ends with."""
    return stage_model(recipe, len(recipe.stages) - 1)


def parity(recipe: Recipe) -> str:
    """What the model is compared with: transformers' class of its family, or what the tests write out."""
    model = last_model(recipe)
    name = CLASSES.get(model.architecture) or ENCODERS.get(model.architecture)
    return f"`{name}`" if name else f"formula of its {model.connector.kind}, written out" if model.connector else "formula"


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
