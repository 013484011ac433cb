"""Which launcher runs a curriculum: by name, each imported only when asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from terrace.cluster.attempt import Launcher
from terrace.curriculum.run import Outcome, run_curriculum
from terrace.errors import InputError
from terrace.recipe.schema import Recipe
from terrace.track.also import require_clients
from terrace.track.progress import Display


def run_with_launcher(
    recipe: Recipe,
    run_dir: Path,
    launcher: str = "local",
    *,
    request: dict[str, Any] | None = None,
    address: str | None = None,
    dashboard: bool = False,
    display: Display | None = None,
) -> Outcome:
    """`terrace run`: the whole curriculum with the named launcher, shown on this process's standard output."""
    require_clients(recipe.tracking.also)
    if launcher == "local" and os.environ.get("RAY_ADDRESS"):
        from terrace.cluster.start_ray import require_answer

        require_answer(os.environ["RAY_ADDRESS"])  # before anything is prepared for a cluster that is not there
    with display or Display() as shown:
        return run_curriculum(recipe, run_dir, make_launcher(recipe, launcher, address, dashboard), shown, request=request)


def make_launcher(recipe: Recipe, name: str, address: str | None, dashboard: bool) -> Launcher:
    if name == "local":
        from terrace.cluster.local import LocalLauncher
        from terrace.curriculum.attempt_worker import modules_of, run_in_worker

        return LocalLauncher(recipe, run_in_worker, dashboard, modules_of(recipe))
    if name == "ray":
        from terrace.cluster.ray_jobs import RayJobsLauncher

        return RayJobsLauncher(address)
    if name == "ranks":
        from terrace.cluster.ranks_launcher import RanksLauncher
        from terrace.curriculum.attempt_worker import run_in_worker

        return RanksLauncher(recipe, run_in_worker)
    if name == "process":
        from terrace.cluster.process_launcher import ProcessLauncher
        from terrace.curriculum.attempt_worker import run_in_worker

        return ProcessLauncher(recipe, run_in_worker)
    raise InputError(f"launcher {name}: use local, process, ray, ranks or kubernetes")
