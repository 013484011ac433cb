"""What `pip install` of the wheel gives: every file that the product reads, one version, and commands that run from there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import terrace
from terrace.recipe.shipped import names

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "platform", "operators", "jobs")
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}


def pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--no-deps", "--quiet"], env=os.environ | OFFLINE, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of an earlier build is in it and nothing is left in the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, tree)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(out), str(tree))
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the wheel in it."""
    target = tmp_path_factory.mktemp("site")
    pip("install", "--target", str(target), str(wheel))
    return target


@pytest.fixture
def started(installed: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen]]:
    """Processes of the installed command, in a working directory without a source tree; ended afterwards."""
    running: list[subprocess.Popen] = []
    yield running
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def start(installed: Path, folder: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(installed / "bin" / "terrace"), *words],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(installed), "PYTHONUNBUFFERED": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def said(installed: Path, folder: Path, *words: str) -> str:
    process = start(installed, folder, *words)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def test_the_wheel_holds_every_file_of_the_packages_and_every_recipe(wheel: Path) -> None:
    """Whatever lies in a package folder is read by somebody: modules, the demo's recipe; and jobs/recipes is mapped in."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licence = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        shipped = {name: archive.read(name) for name in held if name.startswith("terrace/recipe/shipped/")}
    expected = {
        str(path.relative_to(ROOT / top))
        for top in ("platform", "operators")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not any(part.endswith(".egg-info") for part in path.parts)
    }
    recipes = {f"terrace/recipe/shipped/{path.name}": path.read_bytes() for path in (ROOT / "jobs" / "recipes").glob("*.yaml")}
    assert held == expected | set(recipes)
    assert shipped == recipes
    assert len(licence) == 1


def test_the_installed_command_runs_without_the_source_tree(installed: Path, tmp_path: Path, started: list) -> None:
    demo = start(installed, tmp_path, "demo", "--run-dir", str(tmp_path / "demo"))  # beside the others: it takes seconds to begin
    started.append(demo)
    assert said(installed, tmp_path, "--version") == f"terrace {terrace.__version__}\n"
    listed = said(installed, tmp_path, "recipes").splitlines()
    assert [line.split()[0] for line in listed] == names()
    assert said(installed, tmp_path, "recipes", "show", "yi-vl-6b") == (ROOT / "jobs" / "recipes" / "yi-vl-6b.yaml").read_text()
    assert "qwen2.5-vl-7b is valid: 3 stages" in said(installed, tmp_path, "validate", "qwen2.5-vl-7b", "--offline")
    # A copy works from anywhere, with what it extends found by name.
    assert "wrote mimo-vl-7b-rl.yaml" in said(installed, tmp_path, "recipes", "copy", "mimo-vl-7b-rl")
    assert '"recipe": "mimo-vl-7b-rl"' in said(installed, tmp_path, "plan", "mimo-vl-7b-rl.yaml", "--json")
    assert demo.stdout is not None
    first = demo.stdout.readline()
    assert "drawing the demo's corpus into runs/demo-corpus" in first, first


def test_the_version_stands_in_one_place_and_what_repeats_it_agrees() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    chart = yaml.safe_load((ROOT / "k8s" / "helm" / "terrace" / "Chart.yaml").read_text())
    changes = re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {cited["version"], chart["appVersion"], changes[0]} == {terrace.__version__}
