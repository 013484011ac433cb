"""A grpo stage that decodes with a real vLLM: beside training and on a rollout worker, killed and gone on with; and evaluation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import families
import psutil
import pytest
import rl_stage
from rl_stage import figures_of, prepare, rl_recipe, run
from vllm_world import engine_processes, heads_of_32, private_folders, world_of

from terrace.cli import main
from terrace.errors import InputError
from terrace.evaluate.replies import Settings
from terrace.evaluate.run import evaluate_model, read_results
from terrace.generation.vllm import VllmLost
from terrace.generation.vllm_policy import VllmEngine
from terrace.models.export import export_hf
from terrace.recipe.schema import Recipe

pytestmark = pytest.mark.vllm


def recipe_of(folder: Path, steps: int = 3, **grpo) -> Recipe:
    values = rl_recipe(folder, steps, {"engine": "vllm", **grpo}).model_dump(mode="json")
    config = heads_of_32("qwen2_5_vl")
    config["text_config"].pop("vocab_size")
    values["model"]["config"] = config
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prompts, indexed once."""
    folder = tmp_path_factory.mktemp("stage")
    prepare(folder, recipe_of(folder))
    return folder


@pytest.fixture(scope="module")
def ray_cluster():
    ray = pytest.importorskip("ray")
    paths = os.pathsep.join(filter(None, [str(Path(rl_stage.__file__).parent), *sys.path]))
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=300 * 2**20, runtime_env={"env_vars": variables}
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    """Three iterations, colocated, the engine core in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        run(recipe_of(folder), folder, "undisturbed")
    return folder


def test_three_iterations_beside_training(undisturbed):
    lines = figures_of(undisturbed, "undisturbed")
    assert len(lines) == 3
    for line in lines:
        assert line["logprobs_compared"] == 1.0
        assert 0 < line["logprob_mismatch_max"] < 1e-4
        assert line["groups_kept"] > 0
    assert private_folders() == []


def test_killed_in_the_middle_and_gone_on_with(undisturbed, in_its_own_process, monkeypatch):
    recipe, calls = recipe_of(undisturbed), []
    generate = VllmEngine.generate

    def killing(self, prompts, sampling, ready=None, **more):
        calls.append(len(prompts))
        if len(calls) == 5:  # two evaluations before the stage, the first iteration, then this
            [core] = engine_processes()
            core.send_signal(signal.SIGKILL)
        return generate(self, prompts, sampling, ready, **more)

    with monkeypatch.context() as patch:
        patch.setattr(VllmEngine, "generate", killing)
        with pytest.raises(VllmLost, match="its process ended"):
            run(recipe, undisturbed, "killed")
    assert len(figures_of(undisturbed, "killed")) in (1, 2)
    assert engine_processes() == []
    run(recipe, undisturbed, "killed")
    assert figures_of(undisturbed, "killed") == figures_of(undisturbed, "undisturbed")
    assert engine_processes() == [], "its process ends with the stage"
    assert private_folders() == []


def test_seamless(undisturbed, in_this_process):
    """A place that is free takes the next prompt; what trains follows from the order and the rewards, so two runs have the same."""
    for name in ("seamless", "again"):
        run(recipe_of(undisturbed, rollout="seamless"), undisturbed, name)
    lines = figures_of(undisturbed, "seamless")
    for line in lines:
        assert line["groups_kept"] == 4
        assert line["groups_surplus"] == 0
        assert line["logprobs_compared"] == 1.0
        assert line["logprob_mismatch_max"] < 1e-4
    for one, other in zip(lines, figures_of(undisturbed, "again"), strict=True):
        for key in ("tasks", "reward", "groups_drawn", "groups_kept", "supervised_tokens"):
            assert one[key] == other[key], key


def test_a_rollout_worker_answers_as_beside_training(undisturbed, ray_cluster):
    recipe = recipe_of(undisturbed, placement="separate")
    run(recipe, undisturbed, "separate")
    for one, other in zip(figures_of(undisturbed, "undisturbed"), figures_of(undisturbed, "separate"), strict=True):
        for key in ("tasks", "reward", "groups_drawn", "groups_kept", "supervised_tokens"):
            assert one[key] == other[key], key
        assert other["logprob_mismatch_max"] < 1e-4


def test_its_process_ends_with_a_killed_trainer(tmp_path):
    """Or it would hold the GPU's memory that the next attempt needs."""
    script = Path(__file__).with_name("open_and_wait.py")
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    trainer = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    assert "opened\n" in iter(trainer.stdout.readline, "")
    cores = engine_processes(trainer.pid)
    assert len(cores) == 1
    trainer.kill()
    trainer.wait()
    _, left = psutil.wait_procs(cores, timeout=30)
    for process in left:
        process.kill()
    assert left == []


def test_evaluation(tmp_path, in_this_process):
    """Answers of a model directory by either engine; one whose vocabulary outgrows the tokenizer too far is refused by name."""
    rows = []
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(families.picture(60 + 30 * number, 90, number))
        question = [{"role": "user", "content": "<image>How many circles?"}]
        rows.append({"messages": question, "images": [f"{number}.png"], "solution": "3", "task": "counting"})
    (tmp_path / "counting.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = f"counting:{tmp_path}/counting.jsonl"

    def exported(name: str, vocabulary: int) -> Path:
        world = world_of("qwen2_5_vl", tmp_path / name, vocabulary)
        state = {name: parameter.detach() for name, parameter in world.model(1).named_parameters()}
        return export_hf(state, world.case.config, world.case.tokenizer.directory, tmp_path / name / "final", world.case.pixels)

    with pytest.raises(InputError, match=r"tokens may not be sampled .* choose native"):
        evaluate_model(exported("wide", 1800), [suite], tmp_path / "refused", Settings(device="cpu", engine="vllm"))
    assert private_folders() == []
    final, answers = exported("narrow", 448), []
    for engine in ("native", "vllm"):
        arguments = [str(final), suite, "--out", str(tmp_path / engine), "--device", "cpu", "--max-new-tokens", "12", "--engine", engine]
        assert main(["evaluate", *arguments]) == 0
        answers.append([row.answer for row in read_results(tmp_path / engine)[1]])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1
    assert private_folders() == []
