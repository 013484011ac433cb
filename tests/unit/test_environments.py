"""What environments are asked and may answer, in the sandbox; the one that comes with Terrace; and what recipes may say."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from terrace.errors import InputError
from terrace.recipe.rules import check
from terrace.recipe.schema import Recipe
from terrace.recipe.schema_grpo import EnvironmentRule
from terrace.rewards import environment
from terrace.rewards.environment import Step, load_environment, step_of
from terrace.rewards.environments.clicking import clicking
from terrace.rewards.sandbox import SandboxPool


def call_of(response: str = "7", kept=None, **given):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Write digits"}]},
        {"role": "assistant", "content": [{"type": "text", "text": response}]},
    ]
    state = {"solution": "7", "metadata": {"image_sizes": [[4, 4]]}, "turn": 1, "turns": 3, "cut": False, **given}
    return {"conversation": messages, "response": response, "kept": kept or {}, "given": state}


def test_an_environment_in_the_sandbox():
    with SandboxPool(1, item_seconds=20.0) as pool:
        first = pool.step("rl_rules:more_digits", call_of("a7"), {"turns": 2})
        assert first["reward"] == pytest.approx(1 / 6)
        assert not first["done"]
        assert first["kept"] == {"shares": [0.5]}  # what was given is not kept
        picture, text = first["items"]
        assert Image.open(io.BytesIO(base64.b64decode(picture["image"]))).size == (40, 32)
        assert text == {"text": "7: more digits, 0123456789"}
        assert "the state is not the one that was left" in pool.step("rl_rules:more_digits", call_of(turn=2))["failure"]
        for how, said in (
            ("text", "str, which is no Step"), ("nothing", "neither ends the conversation"), ("reward", r"'1.5' is no number in [0, 1]"),
            ("raise", "ZeroDivisionError"), ("object", "found object"), ("state", "not JSON serializable"),
        ):  # fmt: skip
            assert said in pool.step("rl_rules:wrong_environment", call_of(), {"how": how})["failure"], how
        assert pool.step("rl_rules:more_digits", call_of("77"))["reward"] == pytest.approx(1 / 3)  # it goes on after all of that
    with SandboxPool(1, item_seconds=0.5) as pool:
        assert "time limit" in pool.step("rl_rules:wrong_environment", call_of(), {"how": "endless"})["failure"]


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 200, np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_clicking():
    sizes = {"image_sizes": [[200, 100]], "model_sizes": [[100, 50]]}  # the model sees half of each side

    def step(response: str, kept=None, turn: int = 1, cut: bool = False, **options):
        given = {"solution": {"bbox": [100, 20, 140, 40]}, "metadata": sizes, "turn": turn, "turns": 4, "cut": cut}
        given["images"] = [base64.b64encode(png(200, 100)).decode()]
        return step_of(clicking, {**call_of(response, kept), "given": given}, options)

    assert step("[60, 15]") == {"items": None, "reward": 1.0, "done": True, "kept": {}}
    assert step("[60, 15]", turn=3)["reward"] == pytest.approx(0.8)
    assert step("[60, 15]", turn=3, turn_cost=0.3)["reward"] == pytest.approx(0.4)
    missed = step("[10, 40]", hints=True)
    assert (missed["reward"], missed["done"], missed["kept"]) == (None, False, {"clicks": [[10.0, 40.0]]})
    screen = np.asarray(Image.open(io.BytesIO(base64.b64decode(missed["items"][0]["image"]))))
    assert screen.shape == (100, 200, 3)
    assert screen[80, 20].tolist() == [0, 0, 0]  # where it clicked, in the screen's own pixels
    assert screen[80, 120].tolist() == [200, 200, 200]
    assert missed["items"][1]["text"] == "Missed. Go right and up."
    second = step("[90, 24]", kept=missed["kept"], turn=2)
    screen = np.asarray(Image.open(io.BytesIO(base64.b64decode(second["items"][0]["image"]))))
    assert screen[80, 20].tolist() == screen[48, 180].tolist() == [0, 0, 0]  # both clicks
    assert step("over there")["items"] == [{"text": "That is no click. Answer with one point."}]
    assert step("[10, 20, 90, 40]", turn=4) == {"items": None, "reward": 0.0, "done": True, "kept": {}}  # a box is no click
    assert step("[90, 25]", turn=4)["reward"] == 0.0
    for beside in ("[100, 15]", "[60, 50]"):  # 30 pixels right of it, and below it
        assert step(beside, turn=4, closeness=0.3)["reward"] == pytest.approx(0.3 * (1 - 30 / math.hypot(100, 50)))
    assert step("over there", turn=4, closeness=0.3)["reward"] == step("[60, 15]", cut=True, closeness=0.3)["reward"] == 0.0
    assert step("[60, 15]", cut=True) == {"items": None, "reward": 0.0, "done": True, "kept": {}}
    bad = step_of(clicking, {**call_of("[1, 1]"), "given": {"solution": "red", "metadata": {}, "turn": 1, "turns": 4, "cut": False}}, {})
    assert "no box" in bad["failure"]


def recipe_of(stage=None, environment=None, **options) -> Recipe:
    values = {
        "name": "r", "model": {"architecture": "qwen2_5_vl", "config": {}}, "tokenizer": {"train_vocabulary_size": 400},
        "data": {"sources": {"windows": {"uri": "w.jsonl", "kind": "prompt", "task": "click"}}},
        "stages": [{
            "name": "s", "objective": "grpo", "train": {"language": {"lr": 1e-3}}, "mixture": {"weights": {"windows": 1.0}},
            "sequence_length": 2048, "budget": {"steps": 2}, "environment": environment or {"click": {"name": "clicking"}},
            "grpo": {"max_response_tokens": 64, **options}, **(stage or {}),
        }],
    }  # fmt: skip
    return Recipe.model_validate(values)


def told(recipe: Recipe) -> str:
    return "\n".join(str(problem) for problem in check(recipe) if "environment" in str(problem.path) or "rewards" in str(problem.path)
                     or "sequence_length" in str(problem.path) or "task" in str(problem.path))  # fmt: skip


def test_recipes():
    assert told(recipe_of()) == ""
    assert recipe_of().stages[0].longest_conversation == 4 * 64 + 3 * 512
    assert "no room for a prompt beside a conversation of 1792 tokens" in told(recipe_of({"sequence_length": 1700}))
    assert "did you mean `clicking`" in told(recipe_of(environment={"click": {"name": "cliking"}}))
    assert "neither an environment's name" in told(recipe_of(environment={"click": {"name": "my module"}}))
    assert "`clicking` pays by itself" in told(recipe_of({"rewards": {"click": [{"name": "gui_point"}]}}))
    assert "no reward for task `click`" in told(recipe_of(environment={"press": {"name": "clicking"}}))
    assert "belongs to objective grpo" in told(recipe_of({"objective": "lm", "grpo": None}))
    with pytest.raises(InputError, match=r"use one of clicking, or package\.module:function"):
        load_environment("press")
    for name in environment.BUILT_IN:
        assert callable(load_environment(name))
        assert not told(recipe_of(environment={"click": {"name": name}}))  # the rule knows it too
    assert Step(reward=1).observation is None
    assert EnvironmentRule(name="clicking").turns == 4
