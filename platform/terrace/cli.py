"""The `terrace` command: finds the subcommand, runs it, turns its errors into one clear line and an exit status.

0: done. 2: the input is wrong (recipe, data, command line). 143: stopped on request with a checkpoint. 1: anything
else. Each subcommand lives beside its subject and is imported only when it is used, so that `terrace status` starts
in a blink.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from terrace import __version__
from terrace.cluster.ranks import is_follower
from terrace.errors import InputError, TerraceError

# Subcommand -> (module that registers it, one line of help). The help is here so that `terrace --help` imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("terrace.begin.command", "write a recipe for your checkpoint and your rows"),
    "run": ("terrace.curriculum.command", "run a recipe's stages, or continue where an earlier run stopped"),
    "status": ("terrace.curriculum.command", "show a run's stages, steps, losses and checkpoints"),
    "logs": ("terrace.curriculum.command", "show what the workers of a stage attempt logged"),
    "pause": ("terrace.curriculum.command", "finish the stage in flight and start no other"),
    "suspend": ("terrace.curriculum.command", "checkpoint now and release everything"),
    "resume": ("terrace.curriculum.command", "continue a paused, suspended or failed run, or run again from a stage"),
    "cancel": ("terrace.curriculum.command", "end a run for good"),
    "validate": ("terrace.curriculum.command", "check a recipe and print its stages and parameter counts"),
    "plan": ("terrace.planner.command", "memory, FLOPs, hours and cost per stage, before anything runs"),
    "schema": ("terrace.recipe.command", "print the JSON Schema of a recipe (completion in editors)"),
    "recipes": ("terrace.recipe.recipes_command", "list, show or copy the recipes that come with Terrace"),
    "ingest": ("terrace.evaluate.duplicates_command", "turn raw rows and images into shards"),
    "index": ("terrace.data.command", "index shards where they lie"),
    "inspect": ("terrace.data.look.inspect_command", "show a source or a stage as the model sees it, on a page"),
    "order": ("terrace.data.command", "list the first packs of a stage without running it"),
    "recaption": ("terrace.recaption.command", "caption pictures with one model, keep what another finds fitting"),
    "duplicates": ("terrace.evaluate.duplicates_command", "find samples and pictures that stand in several sources or suites"),
    "chat": ("terrace.talk.chat_command", "talk to a model in the terminal"),
    "serve": ("terrace.talk.serve_command", "serve a model over HTTP in OpenAI's form, with a page to try it"),
    "export": ("terrace.talk.export_command", "copy a stage's model out of its run, in another number format if wanted"),
    "evaluate": ("terrace.evaluate.command", "score a model on suites"),
    "report": ("terrace.curriculum.report_command", "write a run's report"),
    "track": ("terrace.curriculum.track_command", "fill an MLflow server, or another tracker, from a run directory"),
    "render": ("terrace.cluster.command", "print the Kubernetes resource of a recipe"),
    "judge": ("terrace.rewards.judge_command", "score given responses with a reward and say why"),
    "serve-rewards": ("terrace.rewards.command", "serve rewards over HTTP"),
    "demo": ("terrace.demo.command", "train a tiny model through a whole curriculum on this machine"),
    "completion": ("terrace.completion", "print a script that completes commands in a shell"),
}
# A file or folder that the user named, or whose place the environment says, cannot be used: running again does not help.
NOT_TO_BE_HAD = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
READ_SAMPLES = ("run", "ingest", "order", "inspect", "duplicates", "recaption")
GROUPS = {
    "Runs": ("run", "status", "logs", "pause", "suspend", "resume", "cancel"),
    "Recipes": ("init", "recipes", "validate", "plan", "schema", "render"),
    "Data": ("ingest", "index", "inspect", "order", "duplicates", "recaption"),
    "Models": ("chat", "serve", "export", "evaluate", "report", "track", "judge", "serve-rewards", "demo", "completion"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    try:
        if not given or given[0] in ("-h", "--help", "help"):
            print(help_text())
            return 0
        if given[0] == "--version":
            print(f"terrace {__version__}")
            return 0
        return run_subcommand(given)
    except TerraceError as error:
        return _fail(error, error.exit_status, debug)
    except KeyboardInterrupt as error:
        return _fail(TerraceError("interrupted") if not debug else error, 130, debug)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left, which is no error of ours
        return 1
    except OSError as error:
        if error.filename is None or error.strerror is None:
            return _fail(error, 1, debug)
        told = f"{error.filename}: {error.strerror}" + ("" if debug else " (--debug shows where)")
        return _fail(error if debug else TerraceError(told), 2 if error.errno in NOT_TO_BE_HAD else 1, debug)
    except Exception as error:
        return _fail(error, 1, debug)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line like every other error, instead of the usage first."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (`{self.prog} --help`)")


def run_subcommand(given: list[str]) -> int:
    """Parse and run."""
    name = given[0]
    parser = _Parser(prog="terrace", add_help=False)
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "`terrace --help` lists the commands"
        print(f"terrace: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        # Named here because a part may be installed without its extra; an error inside our own package is shown as it
        # is.
        raise TerraceError(f"`terrace {name}` needs a module that is not installed: {error.name}") from error
    module.register(subparsers)
    parsed, rest = parser.parse_known_args(given)
    if rest and hasattr(parsed, "overrides") and not any(word.startswith("-") for word in rest):
        parsed.overrides = [*parsed.overrides, *rest]  # key.path=value may stand behind an option too
    elif rest:
        raise InputError(f"unrecognized arguments: {' '.join(rest)} (`terrace {name} --help`)")
    if name in READ_SAMPLES or getattr(parsed, "index", False):
        _draw_demo_scenes(parsed)
    return int(parsed.main(parsed) or 0)


def _draw_demo_scenes(parsed: argparse.Namespace) -> None:
    """jobs/recipes/demo.yaml and what extends it train on scenes that are drawn on first use, so that they run anywhere."""
    path = getattr(parsed, "recipe", None)
    launcher = getattr(parsed, "launcher", None)
    if path is None or launcher == "kubernetes" or is_follower(launcher):
        return  # nothing on this machine is read (the pods see their own volumes), or rank 0 reads it
    from terrace.recipe import shipped
    from terrace.recipe.loading import load_recipe

    file = shipped.recipe_file(Path(path))
    if not file.is_file() or file.suffix.lower() not in (".yaml", ".yml"):
        return  # rows, or nothing: the subcommand says what is wrong
    sources = load_recipe(path, getattr(parsed, "overrides", ())).data.sources
    if any("demo-corpus" in source.uri for source in sources.values()):
        if launcher == "local" and os.environ.get("RAY_ADDRESS"):
            from terrace.cluster.start_ray import require_answer

            require_answer(os.environ["RAY_ADDRESS"])
        from terrace.demo.corpus import draw_missing

        draw_missing(sources, print)


def help_text() -> str:
    lines = [
        "terrace: trains vision-language models through a curriculum of stages",
        "",
        "usage: terrace COMMAND ... [--debug]",
        "",
    ]
    for group, names in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:<14} {COMMANDS[name][1]}" for name in names]
        lines.append("")
    lines += [
        "`terrace COMMAND --help` explains each. A first run:",
        "  terrace demo",
        "  terrace run demo --run-dir runs/demo stages.0.budget.steps=20",
        "",
        "Exit status: 0 done, 2 the input is wrong, 143 stopped on request with a checkpoint, 1 anything else.",
    ]
    return "\n".join(lines)


def _fail(error: BaseException, status: int, debug: bool) -> int:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        text += f" in {sys.executable}; use the Python that Terrace is installed in (activate it before `ray start`, too)"
    name = "" if isinstance(error, TerraceError) else f"{type(error).__name__}: "
    print(f"terrace: {name}{text}", file=sys.stderr)
    if debug:
        traceback.print_exception(error)
    elif not isinstance(error, TerraceError | KeyboardInterrupt):
        print("(--debug shows where)", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
