"""Rewards behind Ray Serve: the remote client gets what the router says, failures as None, and errors without a token."""

from __future__ import annotations

import socket

import pytest

from terrace.errors import InputError
from terrace.recipe.schema_grpo import RewardRule
from terrace.rewards.remote import remote
from terrace.rewards.service import serve_application
from terrace.rewards.types import RewardItem

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_served_rewards_equal_local_ones(ray_cluster, monkeypatch):
    from ray import serve

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        rewards = {"counting": [RewardRule(name="counting")], "text": [RewardRule(name="text_reasoning")]}
        serve.run(serve_application(rewards, "secret", sandbox_workers=1), name="rewards", route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("TERRACE_REWARD_TOKEN", "secret")
        items = [RewardItem("", "4", "4"), RewardItem("", "5", "4"), RewardItem("", "4", "no number")]
        assert remote(items * 40, url=url, task="counting", items_per_request=50) == [1.0, 0.0, None] * 40
        answers = [RewardItem("", r"\boxed{\frac{2}{4}}", r"\frac{1}{2}")]
        assert remote(answers, url=url, task="text") == [1.0]
        monkeypatch.setenv("TERRACE_REWARD_TOKEN", "wrong")
        with pytest.raises(InputError, match="401"):
            remote(items, url=url, task="counting")
    finally:
        serve.shutdown()
