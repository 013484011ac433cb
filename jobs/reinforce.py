"""Train a recipe with on-policy RL stages:

python jobs/reinforce.py RECIPE --run-dir DIR [--prompts FOLDER [--images-root FOLDER]] [key.path=value ...]

The path is the one of `terrace run`: an RL stage (`objective: grpo`) is a stage like any other. `--prompts` takes every
source of prompts from FOLDER instead, by the file name that the recipe gives it.
"""

import argparse
import importlib.util
import sys
from pathlib import Path, PurePosixPath

if importlib.util.find_spec("terrace") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from terrace.cli import main


def moved_prompts(recipe: str, overrides: list[str], prompts: Path, images_root: Path | None) -> list[str]:
    """Overrides that take the recipe's sources of kind prompt from the folder `prompts`."""
    from terrace.errors import TerraceError
    from terrace.recipe.loading import load_recipe

    try:
        sources = load_recipe(recipe, overrides).data.sources
    except TerraceError:
        return []  # `terrace run` reads it again and says what is wrong
    moved = []
    for name, source in sources.items():
        if source.kind == "prompt":
            moved.append(f"data.sources.{name}.uri={prompts / PurePosixPath(source.uri).name}")
            moved += [f"data.sources.{name}.images_root={images_root}"] if images_root else []
    return moved


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--images-root", type=Path)
    options, rest = parser.parse_known_args()
    if options.prompts:
        from terrace.recipe.shipped import shipped_file

        recipe = next((word for word in rest if word.endswith((".yaml", ".yml")) or shipped_file(word)), "")
        overrides = [word for word in rest if "=" in word and not word.startswith("-")]
        rest += moved_prompts(recipe, overrides, options.prompts, options.images_root)
    sys.exit(main(["run", *rest]))
