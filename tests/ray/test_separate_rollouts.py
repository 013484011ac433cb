"""`placement: separate`: rollouts in Ray actors are those of the training workers, and their loss ends the stage by name."""

from __future__ import annotations

import os
import sys

import pytest
import rl_stage
from rl_stage import figures_of, prepare, rl_recipe, run

from terrace.errors import InputError
from terrace.generation.separate import RolloutWorkerLost, SeparateEngine

pytestmark = pytest.mark.ray


def test_separate_needs_ray(tmp_path):
    import ray

    prepare(tmp_path, rl_recipe(tmp_path))
    if not ray.is_initialized():
        with pytest.raises(InputError, match="placement separate"):
            run(rl_recipe(tmp_path, grpo={"placement": "separate"}), tmp_path, "refused")


@pytest.mark.slow
def test_separate_rollouts_have_the_figures_of_colocated_ones(tmp_path, ray_cluster, monkeypatch):
    prepare(tmp_path, rl_recipe(tmp_path))
    run(rl_recipe(tmp_path, 3), tmp_path, "colocated")
    dealt = []
    generate = SeparateEngine.generate

    def counted(self, prompts, sampling, ready=None):
        dealt.append(len(self._workers))
        return generate(self, prompts, sampling, ready)

    monkeypatch.setattr(SeparateEngine, "generate", counted)
    run(rl_recipe(tmp_path, 3, {"placement": "separate", "rollout_workers": 2}), tmp_path, "separate")
    assert set(dealt) == {2}
    for one, other in zip(figures_of(tmp_path, "colocated"), figures_of(tmp_path, "separate"), strict=True):
        for key in ("tasks", "reward", "groups_drawn", "groups_kept", "supervised_tokens"):
            assert one[key] == other[key], key
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_lost_rollout_worker_is_named_and_the_stage_goes_on_when_run_again(tmp_path, ray_cluster, monkeypatch):
    import ray

    recipe = rl_recipe(tmp_path, 3, {"placement": "separate"})
    prepare(tmp_path, recipe)
    run(recipe, tmp_path, "undisturbed")
    push, pushes = SeparateEngine.update_weights, []

    def killing(self, tensors):
        push(self, tensors)
        pushes.append(1)
        if len(pushes) == 3:  # for the evaluation before the stage, for the first iteration, then this
            ray.kill(self._workers[0])

    with monkeypatch.context() as patch:
        patch.setattr(SeparateEngine, "update_weights", killing)
        with pytest.raises(RolloutWorkerLost, match="morl"):
            run(recipe, tmp_path, "lost")
    assert len(figures_of(tmp_path, "lost")) == 1
    run(recipe, tmp_path, "lost")
    assert figures_of(tmp_path, "lost") == figures_of(tmp_path, "undisturbed")


@pytest.mark.slow
def test_two_training_workers_share_a_rollout_worker(tmp_path, ray_cluster):
    """Two processes of one Ray job: gloo between them, one rollout worker for both."""
    import ray

    recipe = rl_recipe(tmp_path, 2, {"placement": "separate"}, evaluate={"max_samples_per_kind": 1})
    prepare(tmp_path, recipe)
    run(rl_recipe(tmp_path, 2, evaluate={"max_samples_per_kind": 1}), tmp_path, "alone")

    @ray.remote(num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}})
    def rank_of(rank: int) -> None:
        import torch.distributed

        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=rank, world_size=2)
        rl_stage.run(recipe, tmp_path, "two", rank, 2)

    ray.get([rank_of.remote(rank) for rank in range(2)])
    for one, two in zip(figures_of(tmp_path, "alone"), figures_of(tmp_path, "two"), strict=True):
        for task, figures in one["tasks"].items():
            assert figures == pytest.approx(two["tasks"][task], rel=1e-3, abs=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
