"""`terrace demo`: a tiny model through the whole curriculum on this machine, then a look at what it learned.

Without `--data` the demo draws its own corpus and ends with an RL stage on drawn prompts; with it, a folder of JSON Lines
takes the corpus's place and the curriculum ends after its four supervised stages (a tiny model earns nothing on real prompts).
The same command again continues a demo that was stopped; of a finished one it shows the result.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from terrace.errors import InputError
from terrace.recipe.schema import Recipe

DRAWN_RECIPE, FOLDER_RECIPE = "demo-morl", Path(__file__).with_name("folder.yaml")


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="train a tiny model through a whole curriculum on this machine",
        description="Draw a corpus of scenes, train a tiny vision-language model through four supervised stages and one of"
        " reinforcement learning, print held-out losses and rewards and show pictures with the model's own answers. With"
        " --data FOLDER: the four supervised stages on the folder's rows.",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of .jsonl files to train on instead")
    parser.add_argument("--run-dir", type=Path, help="directory of the run (default: runs/demo, or runs/demo-<folder>)")
    parser.add_argument(
        "--launcher", choices=("local", "process"), default="local",
        help="local: on a Ray that is started for it, as `terrace run` does (default); process: processes of this machine, less CPU time",
    )  # fmt: skip
    parser.add_argument("--dashboard", action="store_true", help="launcher local: start Ray's dashboard too")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="changes to the recipe")
    parser.set_defaults(main=demo_command)


def demo_command(arguments: argparse.Namespace) -> int:
    from terrace.curriculum.launch import run_with_launcher
    from terrace.demo.along import Clock, Onlooker
    from terrace.track.progress import Display

    run_dir = arguments.run_dir or Path("runs") / ("demo" if arguments.data is None else f"demo-{arguments.data.resolve().name}")
    with Clock() as clock:
        with Display() as display:
            if arguments.data is None:
                recipe = _drawn_recipe(arguments.overrides, display)
            else:
                recipe = _folder_recipe(arguments.data, run_dir, arguments.overrides, display)
        fresh = not (run_dir / "journal.jsonl").exists()
        shown, first = Display(), list[float]()

        def finished(stages: int) -> None:
            results = _collect(recipe, run_dir, arguments.data)
            page = _write_page(results, run_dir, arguments.data)
            first.append(clock.seconds)
            shown.message(f"after {recipe.stages[stages - 1].name}: {in_short(results)}; pictures with answers: {page}")

        with Onlooker(recipe, run_dir, finished, shown.message):
            outcome = run_with_launcher(recipe, run_dir, arguments.launcher, dashboard=arguments.dashboard, display=shown)
        if outcome.phase != "succeeded":
            print(outcome.message, file=sys.stderr)
            return outcome.exit_status
        from terrace.demo.summary import summary_of, write_summary

        results = show(recipe, run_dir, arguments.data)
        if fresh or not (run_dir / "summary.json").exists():
            write_summary(summary_of(results, clock if fresh else None, min(first, default=None)), run_dir)
    return 0


def _drawn_recipe(overrides: list[str], display) -> Recipe:
    from terrace.demo.corpus import draw_missing
    from terrace.recipe.loading import load_recipe

    recipe = load_recipe(DRAWN_RECIPE, overrides)
    draw_missing(recipe.data.sources, display.message, lambda done, total: display.activity("drawing scenes", done, total))
    return recipe


def _folder_recipe(folder: Path, run_dir: Path, overrides: list[str], display) -> Recipe:
    """The folder's own recipe, written beside its run on the first call and read again from there."""
    from terrace.demo.folder import find_sources, folder_recipe
    from terrace.recipe.loading import load_recipe

    path = run_dir / "folder-recipe.yaml"
    if path.is_file():
        earlier = {Path(source.uri).parent for source in load_recipe(path).data.sources.values()}
        if earlier != {folder.resolve()}:
            raise InputError(f"{run_dir} holds a demo of {', '.join(map(str, earlier))}; name another --run-dir for {folder}")
    else:
        found, left_out = find_sources(folder)
        for source in found:
            display.message(f"{source.path.name}: {source.rows:,} rows, {source.kind}")
        for line in left_out:
            display.message(f"left out: {line}")
        mapping = folder_recipe(yaml.safe_load(FOLDER_RECIPE.read_text()), found, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=120))
    return load_recipe(path, overrides)


def _collect(recipe: Recipe, run_dir: Path, folder: Path | None):
    import torch

    from terrace.demo.results import EXACT, TASKS, collect

    torch.set_num_threads(1)  # the workers of the next stage have the cores, and one-token steps are too small to share
    return collect(recipe, run_dir, judged=tuple(TASKS) if folder is None else EXACT)


def _write_page(results, run_dir: Path, folder: Path | None) -> Path:
    from terrace.demo.page import write_page

    where = "drawn scenes" if folder is None else f"the rows of {folder}"
    return write_page(results, run_dir / "gallery.html", f"A tiny vision-language model, trained from random weights on {where}.")


def in_short(results) -> str:
    """How many held-out questions are right, by kind."""
    from terrace.demo.results import TASKS

    if not results.asked:
        return "asked, nothing of it can be judged by a rule"
    kinds = ", ".join(f"{TASKS[kind].lower()} {right}/{asked}" for kind, (right, asked) in results.scores.items() if right)
    return f"{results.right} of {results.asked} held-out questions right" + (f" ({kinds})" if kinds else "")


def show(recipe: Recipe, run_dir: Path, folder: Path | None):
    """Print what the models of all stages say to held-out questions; write gallery.html and gallery.png into the run directory."""
    from rich.console import Console

    from terrace.demo.gallery import write_sheet
    from terrace.demo.tables import print_answers, print_losses, print_rewards, print_scores

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150  # a log file has no width of its own
    results = _collect(recipe, run_dir, folder)
    print_losses(results, console)
    print_rewards(results, console)
    print_scores(results, console)
    print_answers(results, console)
    page, sheet = _write_page(results, run_dir, folder), write_sheet(results, run_dir / "gallery.png")
    console.print(f"\nPictures with the model's answers: [bold]{page}[/bold] and [bold]{sheet}[/bold]", soft_wrap=True)
    final = run_dir / "stages" / f"{len(recipe.stages):02d}-{recipe.stages[-1].name}" / "final"
    console.print(f"The model as a Hugging Face directory: [bold]{final}[/bold]", soft_wrap=True)
    console.print(f"Metrics: [bold]mlflow ui --backend-store-uri sqlite:///{run_dir}/mlflow.db[/bold]", soft_wrap=True)
    return results
