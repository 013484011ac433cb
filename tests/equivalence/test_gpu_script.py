"""The script for a GPU runs from end to end on a tiny shape, with torch and transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_check.py"
WITHOUT = """
import runpy, sys
for absent in (
    "pydantic", "ray", "deepspeed", "mlflow", "s3fs", "pyarrow", "simplejpeg", "sacrebleu", "math_verify", "accelerate", "psutil",
):
    sys.modules[absent] = None  # importing it raises ImportError
sys.argv = [{script!r}, "--tiny", "--out", {out!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_the_gpu_script_runs_tiny_on_a_cpu(tmp_path):
    code = WITHOUT.format(script=str(SCRIPT), out=str(tmp_path / "out.json"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == results
    assert results["good"] is True
    kernels = results["kernels"]
    assert {name.split(", ")[0] for name in kernels} == {"vision windows", "vision images", "language"}
    assert all(0 < max(found["errors"]) < found["tolerance"] for found in kernels.values())
    assert all(max(found["errors"]) < found["tolerance"] for found in results["loss"].values())
    assert len(results["training"]) == 4
    for found in results["training"].values():
        assert found["tokens_per_second"] > 0
        assert found["losses"][1] < found["losses"][0]
        assert found["peak_gib"] > 0.1


@pytest.mark.slow
def test_it_fails_where_the_kernels_are_wrong(tmp_path):
    """A scale that is off by a tenth must not pass."""
    code = WITHOUT.format(script=str(SCRIPT), out=str(tmp_path / "out.json")).replace(
        "runpy.run_path(",
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\nimport plain_schema\nplain_schema.stand_in_where_missing()\n"
        "sys.argv += ['--only', 'kernels']\nimport terrace.models.attention as a\nreal = a.sdpa_segments\n"
        "a.sdpa_segments = lambda q, k, v, b, c, s: real(q, k, v, b, c, s * 1.1)\nrunpy.run_path(",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "FAIL kernels: language" in done.stdout
