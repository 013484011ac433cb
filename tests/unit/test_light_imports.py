"""The light layers stay light: a laptop validates and plans a recipe, and the operator runs, without torch or ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIGHT = [
    "terrace.cli",
    "terrace.recipe.loading",
    "terrace.recipe.rules",
    "terrace.curriculum.machine",
    "terrace.curriculum.state",
    "terrace.curriculum.journal",
    "terrace.planner.plan",
    "terrace.rewards.router",
    "terrace_operator.reconcile",
]


@pytest.mark.parametrize("module", LIGHT)
def test_module_imports_neither_torch_nor_ray(module: str) -> None:
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'platform')!r}, {str(ROOT / 'operators')!r}]; import {module}; "
        "heavy = sorted({'torch', 'ray', 'transformers', 'deepspeed', 'mlflow', 'vllm'} & set(sys.modules)); "
        "assert not heavy, f'imported {heavy}'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_platform_folder_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
