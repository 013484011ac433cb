"""Generation that goes on while the policy trains: no draw is lost or trained twice, however often the run is killed."""

from __future__ import annotations

import math
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rl_stage import break_at, figures_of, prepare, rl_recipe, run

from terrace.generation.copies import EngineOnCopy
from terrace.objectives.grpo import PolicyOptions, token_losses
from terrace.rl import ledger
from terrace.rl.overlap import OverlappedCollector


class Killed(BaseException):
    """Stands for a process that ends at once."""


def killed() -> None:
    raise Killed


def options(staleness: int, **overlap) -> dict:
    return {"rollout": "seamless", "max_response_tokens": 16, "overlap": {"max_staleness": staleness, **overlap}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap")
    prepare(folder, rl_recipe(folder))
    return folder


def checked(folder, name: str, iterations: int, staleness: int) -> list[dict]:
    """The ledger, once every draw has one fate, every iteration its groups and no token is too old."""
    lines = ledger.read(folder / name)
    assert [line["iteration"] for line in lines] == list(range(1, iterations + 1))
    fates = [draw for line in lines for draw, *_ in (*line["trained"], *line["stale"])]
    fates += [draw for line in lines for kind in ("without_difference", "unjudged", "damaged", "unready") for draw in line[kind]]
    assert sorted(fates) == list(range(lines[-1]["draws"][1])), "no draw is lost, and none has two fates"
    assert [line["draws"][0] for line in lines[1:]] == [line["draws"][1] for line in lines[:-1]]
    for line in lines:
        assert len(line["trained"]) == 4
        assert all(line["iteration"] - 1 - staleness <= oldest <= newest < line["iteration"] for _, oldest, newest in line["trained"])
        assert all(oldest < line["iteration"] - 1 - staleness for _, oldest, _ in line["stale"])
    metrics = figures_of(folder, name)
    assert [line["step"] for line in metrics] == list(range(1, iterations + 1))
    assert all(line["groups_drawn"] + line["groups_stale"] == one["draws"][1] - one["draws"][0] for line, one in zip(metrics, lines))
    return lines


def slow_updates(monkeypatch) -> None:
    """Weights that are handed over only once something more is decoded: so that there is something that is older."""
    update = EngineOnCopy.update_weights

    def later(self, tensors, version=0):
        before = self.usage.steps
        for _ in range(200):
            if not version or self.usage.steps >= before + 6:
                break
            waited.wait(0.01)
        update(self, tensors, version)

    waited = threading.Event()
    monkeypatch.setattr(EngineOnCopy, "update_weights", later)


def kill_and_go_on(folder, name: str, kills: int, seed: int, iterations: int, staleness: int) -> int:
    """Run a stage to its end with `kills` kills at random places; returns how many took place."""
    chance, done = random.Random(seed), 0
    recipe = rl_recipe(folder, iterations, options(staleness))
    while True:
        undo = None
        if done < kills:
            where = chance.choice(("rollout", "reward", "update"))
            undo = break_at(where, None, killed, chance.randrange(1, {"rollout": 60, "reward": 16, "update": 4}[where]))
        try:
            run(recipe, folder, name)
            return done
        except Killed:
            done += 1
        finally:
            if undo is not None:
                undo()


def test_nothing_is_lost_or_trained_twice(folder, monkeypatch):
    slow_updates(monkeypatch)
    ahead, allow = set(), OverlappedCollector._allow
    monkeypatch.setattr(
        OverlappedCollector, "_allow", lambda self, following: ahead.add(following - self._version) or allow(self, following)
    )
    assert kill_and_go_on(folder, "killed", 3, 5, 4, 1) == 3
    assert ahead == {0, 1}, "while the policy trains, groups are begun for the iterations behind that one"
    lines = checked(folder, "killed", 4, 1)
    assert any(oldest < line["iteration"] - 1 for line in lines for _, oldest, _ in line["trained"]), "some of it was generated meanwhile"
    for line in figures_of(folder, "killed"):
        assert 0 <= line["staleness_mean"] <= line["staleness_max"] <= 1
        assert line["importance_weight"] == pytest.approx(1, abs=0.3)
        assert not math.isnan(line["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 3])
def test_nothing_is_lost_or_trained_twice_under_20_kills(folder, monkeypatch, staleness):
    slow_updates(monkeypatch)
    kills, runs = 0, 0
    while kills < 20:  # a run may end before its next place is reached
        name = f"twenty-{staleness}-{runs}"
        kills += kill_and_go_on(folder, name, 20 - kills, 10 * staleness + runs, 12, staleness)
        checked(folder, name, 12, staleness)
        runs += 1
    assert runs < 5, "most places are reached"


@pytest.mark.parametrize(("staleness", "version", "following", "groups"), [
    (2, 0, 0, 12), (2, 0, 1, 8), (2, 7, 7, 12), (2, 8, 8, 8), (2, 9, 9, 4), (2, 9, 10, 0), (0, 3, 3, 4), (0, 3, 4, 0),
])  # fmt: skip
def test_no_more_groups_are_begun_than_can_still_train(staleness, version, following, groups):
    """Of 4 prompts and 10 iterations: those from `following` on that may train what the weights of `version` sample."""
    collector = object.__new__(OverlappedCollector)
    collector.order, collector.options = SimpleNamespace(iterations=10), SimpleNamespace(prompts_per_iteration=4)
    collector.context, collector._ahead = SimpleNamespace(world_size=1), SimpleNamespace(lock=threading.Lock(), allowed=None)
    collector._version, collector._most_stale, collector._extra = version, staleness, 0
    collector._allow(following)
    assert collector._ahead.allowed == groups


def test_without_staleness_it_is_the_on_policy_run(folder):
    """Also where it is spelled with a correction: a weight of 1."""
    run(rl_recipe(folder, 2, options(0, correction="sequence", beyond="mask")), folder, "zero")
    run(rl_recipe(folder, 2, {"rollout": "seamless", "max_response_tokens": 16}), folder, "on-policy")
    assert figures_of(folder, "zero") == figures_of(folder, "on-policy")
    first, second = ((folder / name / "final" / "model.safetensors").read_bytes() for name in ("zero", "on-policy"))
    assert first == second


def test_importance_weights_by_hand():
    """Two responses of 2 and 1 tokens that the training weights find e^0.5, e^0.5 and e^1.5 times as likely."""
    sampled, lengths, advantages = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([2, 1]), torch.tensor([1.0, 1.0, -2.0])
    expected = {
        ("token", False): [math.exp(0.5), math.exp(0.5), 2.0], ("token", True): [math.exp(0.5), math.exp(0.5), 0.0],
        ("sequence", False): [2.0, 2.0, 2.0], ("sequence", True): [0.0, 0.0, 0.0], (None, False): [1.0, 1.0, 1.0],
    }  # fmt: skip
    for (level, masks), weights in expected.items():
        logprobs = (sampled + torch.tensor([0.5, 0.5, 1.5])).requires_grad_()
        how = PolicyOptions(correction=level, correction_bound=2.0, correction_masks=masks)
        losses, sums = token_losses(logprobs, torch.zeros(3), advantages, None, None, how, lengths, sampled)
        losses.sum().backward()
        assert logprobs.grad.tolist() == pytest.approx([-a * w for a, w in zip(advantages.tolist(), weights)])
        if level is not None:
            assert float(sums["importance"]) == pytest.approx(sum(weights))
            assert float(sums["held"]) == sum(w in (0.0, 2.0) for w in weights)
    unknown, _ = token_losses(
        torch.zeros(1), torch.zeros(1), torch.ones(1), None, None, PolicyOptions(correction="token"), None, torch.tensor([np.nan])
    )
    assert unknown.tolist() == [-1.0]
