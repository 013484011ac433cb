"""The training loop runs where neither Ray, DeepSpeed nor MLflow is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
for absent in ("ray", "deepspeed", "mlflow"):
    sys.modules[absent] = None  # importing it raises ImportError
import tempfile
from pathlib import Path
import terrace.curriculum.attempt_worker
from packs import tiny_recipe
from ranks import train_stages
with tempfile.TemporaryDirectory() as folder:
    recipe = tiny_recipe(budget={{"steps": 1}})
    print(train_stages(0, 1, recipe.model_dump(mode="json"), folder)[0].steps)
"""


def test_a_stage_runs_without_ray_deepspeed_and_mlflow():
    tests = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tests=tests)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("1")
