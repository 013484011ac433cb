"""The images' Dockerfiles: what they copy exists, their steps build here, and each has its bill of materials."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from cluster_world import ROOT
from image_build import BuildError, built, instructions, machine_files
from tiny_recipes import tiny

from terrace.recipe.loading import dump_recipe

IMAGES = sorted((ROOT / "k8s/images").glob("*.Dockerfile"))


def can_mount(tmp_path) -> bool:
    """Whether this process may mount an overlay here (root, and no overlay below)."""
    parts = [tmp_path / name for name in ("u", "w", "r")]
    for part in parts:
        part.mkdir()
    options = f"lowerdir=/,upperdir={parts[0]},workdir={parts[1]}"
    words = ["mount", "-t", "overlay", "overlay", "-o", options, str(parts[2])]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(parts[2])], check=True)
    return True


@pytest.mark.parametrize("dockerfile", IMAGES, ids=lambda path: path.stem)
def test_what_is_copied_exists_and_the_user_is_not_root(dockerfile):
    found = list(instructions(dockerfile.read_text()))
    for word, rest in found:
        if word == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / file).exists() for file in rest.split()[:-1]), rest
    users = [rest for word, rest in found if word == "USER"]
    assert users
    assert re.fullmatch(r"[1-9][0-9]+:[1-9][0-9]+", users[-1])
    assert "bom.json" in dockerfile.read_text()


def test_the_training_image_takes_extras_that_the_package_has():
    """Its packages are gigabytes, installed by the slow test below; they are those of `make install`, under the same constraints."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r'"\.\[([a-z,]+)\]"', (ROOT / "k8s/images/training.Dockerfile").read_text())
    assert asked
    assert set(asked[0].split(",")) <= set(extras)


def test_the_bill_names_every_package_of_an_environment():
    script = str(ROOT / "k8s/images/bill_of_materials.py")
    bill = json.loads(subprocess.run([sys.executable, script, "here", "1"], capture_output=True, text=True, check=True).stdout)
    parts = {part["name"]: part for part in bill["components"]}
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert parts["pydantic"]["purl"] == f"pkg:pypi/pydantic@{parts['pydantic']['version']}"
    assert len({part["bom-ref"] for part in bill["components"]}) == len(bill["components"]) > 50
    assert parts["pyyaml"]["licenses"]


@pytest.mark.slow  # a minute: the packages of the operator are installed anew
def test_the_operators_image_builds_and_starts(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("needs root and overlay mounts")
    dockerfile = ROOT / "k8s/images/operator.Dockerfile"
    with built(dockerfile, ROOT, tmp_path / "image") as image:
        help_text = image.run([*image.entrypoint, "--help"])
        assert "--namespace" in help_text
        bill = json.loads((image.root / "opt/venv/bom.json").read_text())
        names = {part["name"] for part in bill["components"]}
        assert {"kopf", "kubernetes", "pydantic", "terrace"} <= names
        assert not names & {"torch", "ray", "transformers", "mlflow"}
        modules = "import sys, terrace_operator.controller; print([m for m in ('torch', 'ray') if m in sys.modules])"
        assert image.run(["python", "-c", modules]).strip() == "[]"
        assert image.run(["id", "-u"]).strip() == "10001"
        with pytest.raises(BuildError):  # nothing of it can be changed by the user it runs as
            image.run(["/bin/sh", "-c", "touch /opt/venv/x"])


@pytest.mark.timeout(3600)
@pytest.mark.slow  # minutes and 4 GB: torch, Ray and DeepSpeed are installed anew
def test_the_training_image_builds_and_trains_as_its_user(tmp_path, monkeypatch):
    if not can_mount(tmp_path):
        pytest.skip("needs root and overlay mounts")
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 12 GB of disk")
    monkeypatch.setenv("PIP_RETRIES", "0")  # an index that this machine does not reach is asked once for each package
    with built(ROOT / "k8s/images/training.Dockerfile", ROOT, tmp_path / "image") as image:
        bill = json.loads((image.root / "opt/venv/bom.json").read_text())
        names = {part["name"] for part in bill["components"]}
        assert {"torch", "ray", "deepspeed", "transformers", "mlflow", "s3fs", "kubernetes", "terrace"} <= names
        assert not names & {"pytest", "ruff"}
        assert image.run(["id", "-u"]).strip() == "1000"
        assert "terrace run" in image.run(image.command)
        with pytest.raises(BuildError):  # nothing of it can be changed by the user it runs as
            image.run(["/bin/sh", "-c", "touch /opt/venv/x"])
        rows = image.root / "tmp/rows"
        recipe = dump_recipe(tiny("llava-1.5-7b", rows)).replace(str(image.root), "")
        (rows / "recipe.yaml").write_text(recipe)
        with machine_files(image):
            stage = "stages.feature-alignment"  # DeepSpeed compiles its small operation, and Ray starts
            words = [f"{stage}.parallel.strategy=zero2", f"{stage}.data_loading.engine=ray"]
            image.run(["python", "jobs/pretrain.py", "/tmp/rows/recipe.yaml", "--run-dir", "/tmp/run", *words])
            assert "complete" in image.run(["terrace", "status", "/tmp/run"])
