"""Ray as the command starts it: its workers are forks that have everything imported, with threads and ids of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "e2e"))
from e2e_runs import environment  # noqa: E402

from terrace.cluster import fork_server  # noqa: E402

PROGRAM = """
import json, sys
from terrace.cluster.start_ray import start_ray
from terrace.curriculum.attempt_worker import modules_of
from terrace.recipe.loading import load_recipe

recipe = load_recipe(sys.argv[1])
modules = modules_of(recipe)
start_ray(recipe, preload=modules)
import ray

class Worker:
    def look(self, modules):
        import sys
        had = [name for name in modules if name not in sys.modules]
        import numpy, ray, torch
        return {
            "missing": had, "threads": torch.get_num_threads(), "id": ray.ObjectID.from_random().hex(),
            "drawn": float(numpy.random.random()), "cuda": torch.cuda.is_initialized(),
        }

found = []
for cpus, variables in ((1, {}), (2, {}), (1, {"RAY_TRAIN_V2_ENABLED": "1"}), (1, {"ANOTHER": "one"})):
    worker = ray.remote(num_cpus=cpus, runtime_env={"env_vars": variables})(Worker).remote()
    found.append(ray.get(worker.look.remote([*modules, "ray.train.torch", "ray.data"])))
    ray.kill(worker)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_workers_have_everything_and_share_no_numbers():
    program = [sys.executable, "-c", PROGRAM, str(REPOSITORY / "tests" / "recipes" / "tiny.yaml")]
    values = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"} | {fork_server.SWITCH: "1"}
    ended = subprocess.run(program, env=values, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    *forks, other = json.loads(ended.stdout.splitlines()[-1])
    assert [(fork["missing"], fork["threads"], fork["cuda"]) for fork in forks] == [([], 1, False), ([], 2, False), ([], 1, False)]
    assert len({fork["id"] for fork in forks}) == len({fork["drawn"] for fork in forks}) == 3
    assert other["missing"], "a worker with a variable of its own is a new Python"
