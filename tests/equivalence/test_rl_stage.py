"""An on-policy stage end to end: it learns, resumes inside an iteration with the same figures, and splits over ranks."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import rl_rules
import rl_stage
from PIL import Image
from processes import run_ranks
from rl_stage import break_at, figures_of, prepare, rl_recipe, run

from terrace.curriculum.gates import metric_value
from terrace.data.prepare import load_prepared
from terrace.errors import InputError, Preempted
from terrace.generation.native import NativeEngine
from terrace.rewards.remote import RewardServiceError
from terrace.rewards.types import RewardItem
from terrace.rl.collect import RewardFailures
from terrace.rl.prompts import PromptOrder
from terrace.train.metrics import measured
from terrace.train.watchdog import hang_folder


class Killed(BaseException):
    """Stands for a process that ends at once."""


def killed() -> None:
    raise Killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    prepare(folder, rl_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    run(rl_recipe(folder), folder, "undisturbed")
    return figures_of(folder, "undisturbed")


def close(first, second, tolerance):
    """Whether two values from metrics agree, numbers within the tolerance."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[key], second[key], tolerance) for key in first)
    if isinstance(first, float) and isinstance(second, float):
        return first == pytest.approx(second, rel=tolerance, abs=tolerance)
    return first == second


def test_metrics_say_what_the_paper_asks_per_task(undisturbed):
    assert [line["step"] for line in undisturbed] == [1, 2, 3]
    for line in undisturbed:
        assert set(line["tasks"]) == {"digits", "capitals"}
        for figures in line["tasks"].values():
            expected = {
                "reward",
                "pass_rate",
                "zero_variance",
                "response_tokens",
                "entropy",
                "truncated",
                "reward_failures",
            }
            assert expected <= set(figures)
        assert line["groups_kept"] == 4
        assert line["logprob_mismatch_max"] < 1e-4
        assert line["loss"] == pytest.approx(line["loss"])


@pytest.mark.parametrize("where", ["rollout", "reward", "update"])
def test_a_stage_broken_inside_an_iteration_goes_on_with_the_same_figures(folder, undisturbed, where):
    undo = break_at(where, 1, killed)
    try:
        with pytest.raises(Killed):
            run(rl_recipe(folder), folder, f"broken-{where}")
    finally:
        undo()
    assert len(figures_of(folder, f"broken-{where}")) == 1
    run(rl_recipe(folder), folder, f"broken-{where}")
    assert figures_of(folder, f"broken-{where}") == undisturbed
    assert judgements_of(folder, f"broken-{where}") == judgements_of(folder, "undisturbed")
    assert not list((folder / f"broken-{where}" / "iterations").glob("0*"))


def judgements_of(folder, name):
    """The sample of judgements that the stage's report shows."""
    return json.loads((folder / name / "calibration.json").read_text())


def test_a_sample_of_judgements_is_kept_for_the_report(folder, undisturbed):
    kept = judgements_of(folder, "undisturbed")
    judged = {task: sum(6 * line["tasks"][task]["groups"] for line in undisturbed) for task in ("digits", "capitals")}
    assert kept["seen"] == judged
    assert all(len(shown) == min(20, judged[task]) for task, shown in kept["shown"].items())
    assert {one["iteration"] for shown in kept["shown"].values() for one in shown} <= {1, 2, 3}
    for one in kept["shown"]["digits"]:
        assert one["value"] == pytest.approx(sum(char.isdigit() for char in one["response"]) / max(len(one["response"]), 1))
        (picture,) = kept["pictures"][one["prompt_id"]]
        with Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/jpeg;base64,")))) as opened:
            assert max(opened.size) <= 160
    assert not any(kept["pictures"][one["prompt_id"]] for one in kept["shown"]["capitals"])


def test_finished_rollouts_are_not_decoded_again(folder, monkeypatch):
    undo = break_at("update", 1, killed)
    try:
        with pytest.raises(Killed):
            run(rl_recipe(folder), folder, "no-second-decoding")
    finally:
        undo()
    decoded = []
    generate = NativeEngine.generate

    def counted(self, prompts, sampling, ready=None):
        decoded.append(sampling.samples)
        return generate(self, prompts, sampling, ready)

    monkeypatch.setattr(NativeEngine, "generate", counted)
    run(rl_recipe(folder), folder, "no-second-decoding")
    # The last iteration and the evaluation after the stage; the broken iteration's rollouts came from disk.
    assert decoded.count(6) == 1


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rollout", "reward", "update"])
def test_a_killed_process_is_followed_by_one_with_the_same_figures(folder, undisturbed, where):
    recipe_file = folder / "recipe.json"
    recipe_file.write_text(rl_recipe(folder).model_dump_json())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, rl_stage.__file__, str(folder), f"killed-{where}", str(recipe_file)]
    first = subprocess.run([*command, where], env=environment, check=False)
    assert first.returncode == -signal.SIGKILL
    subprocess.run([*command, "nowhere"], env=environment, check=True)
    assert figures_of(folder, f"killed-{where}") == undisturbed


@pytest.mark.parametrize(
    ("where", "doing"),
    [
        ("rollout", "decoding the rollouts of"),
        pytest.param("reward", "decoding the rollouts of", marks=pytest.mark.slow),  # rewards are asked for while others decode
        pytest.param("update", "in forward and backward of pack 1 of", marks=pytest.mark.slow),
    ],
)
def test_a_hang_ends_the_process_and_says_where(folder, where, doing):
    recipe_file = folder / f"hang-{where}.json"
    recipe_file.write_text(rl_recipe(folder, failure={"hang_timeout_seconds": 8}).model_dump_json())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, rl_stage.__file__, str(folder), f"hang-{where}", str(recipe_file), where, "hang"]
    assert subprocess.run(command, env=environment, check=False, timeout=300).returncode == 1
    stacks = hang_folder(folder / f"hang-{where}", 1)
    assert f"rank 0 {doing} step 2" in json.loads((stacks / "summary.json").read_text())["message"]
    assert "in hang" in (stacks / "stacks-00000.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_two_ranks_have_the_figures_of_one(folder, undisturbed, strategy):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    recipe = rl_recipe(folder, 2, parallel={"strategy": strategy}, evaluate={"max_samples_per_kind": 1})
    run_ranks(2, rl_stage.run_rank, recipe.model_dump(mode="json"), str(folder), strategy)
    for one, two in zip(undisturbed[:2], figures_of(folder, strategy), strict=True):
        for key in (
            "loss",
            "grad_norm",
            "supervised_tokens",
            "samples",
            "groups_drawn",
            "groups_kept",
            "reward",
            "tasks",
        ):
            assert close(one[key], two[key], 1e-3), key


def test_ranks_decode_together_in_rounds_and_in_evaluations(folder, monkeypatch):
    """Where an engine needs every rank (weights in shards), none may decode outside of what all enter."""
    inside, generate, calls = [False], NativeEngine.generate, []

    @contextlib.contextmanager
    def together(self):
        inside[0] = True
        yield
        inside[0] = False

    def generating(self, *arguments, **keywords):
        calls.append(inside[0])
        return generate(self, *arguments, **keywords)

    monkeypatch.setattr(NativeEngine, "together", together)
    monkeypatch.setattr(NativeEngine, "generate", generating)
    run(rl_recipe(folder, 1, evaluate={"max_samples_per_kind": 1}), folder, "together")
    assert len(calls) >= 3, "a greedy and a sampled evaluation, and a round"
    assert all(calls)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_a_copy_in_shards_decodes_what_a_whole_one_does(folder, strategy):
    """The same answers, so the same losses."""
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    for name, divided in ((f"whole-{strategy}", False), (f"divided-{strategy}", True)):
        options = {"shard_copy": divided, "samples_per_prompt": 5}
        recipe = rl_recipe(folder, 2, options, parallel={"strategy": strategy}, evaluate={"max_samples_per_kind": 1})
        run_ranks(2, rl_stage.run_rank, recipe.model_dump(mode="json"), str(folder), name)
    for one, two in zip(figures_of(folder, f"whole-{strategy}"), figures_of(folder, f"divided-{strategy}"), strict=True):
        for key in ("loss", "grad_norm", "reward", "tasks", "supervised_tokens"):
            assert close(one[key], two[key], 1e-6), key


@pytest.mark.slow
def test_a_rank_that_has_its_rollouts_serves_one_that_lost_them(folder):
    """Broken between decoding and the update; one rank's file is gone then. The copy is in shards, so the other must take part again."""
    recipe = rl_recipe(folder, 2, {"shard_copy": True}, parallel={"strategy": "fsdp"}, evaluate={"max_samples_per_kind": 1})
    values = recipe.model_dump(mode="json")
    run_ranks(2, rl_stage.run_rank, values, str(folder), "served-whole")
    with pytest.raises(AssertionError, match="broken in the update"):
        run_ranks(2, rl_stage.run_rank_breaking, values, str(folder), "served")
    (folder / "served" / "iterations" / "000001" / "rollout-0-1.npz").unlink()
    run_ranks(2, rl_stage.run_rank, values, str(folder), "served")
    assert figures_of(folder, "served") == figures_of(folder, "served-whole")


@pytest.mark.slow
def test_a_reference_in_shards_on_two_ranks_gives_the_kl_of_a_whole_one(folder):
    options = {"kl_coefficient": 0.1, "updates_per_rollout": 2}
    run(rl_recipe(folder, 2, options), folder, "kl-whole")
    shards = rl_recipe(folder, 2, options, parallel={"strategy": "fsdp"}).model_dump(mode="json")
    run_ranks(2, rl_stage.run_rank, shards, str(folder), "kl-shards")
    for one, two in zip(figures_of(folder, "kl-whole"), figures_of(folder, "kl-shards"), strict=True):
        for key in ("loss", "grad_norm", "kl"):
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key
    assert figures_of(folder, "kl-shards")[1]["kl"] > 0


def test_told_to_stop_it_saves_and_goes_on(folder, undisturbed):
    with pytest.raises(Preempted):
        run(rl_recipe(folder, checkpoint={}), folder, "stopped", should_stop=lambda: "test")
    assert len(figures_of(folder, "stopped")) == 1
    run(rl_recipe(folder, checkpoint={}), folder, "stopped")
    assert figures_of(folder, "stopped") == undisturbed


def test_rewards_rise_for_every_task(folder):
    """The two tasks want opposite answers: a random start tells their prompts apart within 18 iterations with some seeds only."""
    recipe = rl_recipe(
        folder, 18, {"prompts_per_iteration": 6, "samples_per_prompt": 16}, train={"language": {"lr": 2e-2}}, seed=3,
        checkpoint={}, evaluate={"max_samples_per_kind": 4, "every_steps": 9},
    )  # fmt: skip
    run(recipe, folder, "learning")
    lines = figures_of(folder, "learning")
    for task in ("digits", "capitals"):
        rewards = [line["tasks"][task]["reward"] for line in lines]
        assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.3, rewards
    result = json.loads((folder / "learning" / "result.json").read_text())
    for figure in ("reward", "greedy_reward"):
        for task in ("digits", "capitals"):
            name = f"{figure}/{task}"
            assert result["evaluation"]["after"][name] > result["evaluation"]["before"][name] + 0.3
    assert metric_value(result, "eval/reward/digits") == result["evaluation"]["after"]["reward/digits"]
    # Held-out rewards in the middle stand in the step's line, for the report and for gates.
    assert [line["step"] for line in lines if "evaluation" in line] == [9]
    assert lines[8]["evaluation"].keys() == result["evaluation"]["after"].keys()
    assert measured(lines[8])["eval/reward/digits"] == lines[8]["evaluation"]["reward/digits"]
    assert (folder / "learning" / "final" / "config.json").is_file()
    examples = [json.loads(line) for line in (folder / "learning" / "examples.jsonl").read_text().splitlines()]
    assert {one["task"] for one in examples} == {"digits", "capitals"}


def test_the_relatives_run(folder):
    """Several clipped updates per rollout, KL, entropy bonus, leave-one-out without std, easy pool."""
    options = {
        "updates_per_rollout": 2, "clip_low": 0.2, "clip_high": 0.28, "kl_coefficient": 0.01, "entropy_coefficient": 0.001,
        "baseline": "leave_one_out", "normalise": "none", "easy_pool_probability": 0.2, "top_p": 0.9, "temperature": 1.2,
    }  # fmt: skip
    run(rl_recipe(folder, 4, options), folder, "relatives")
    lines = figures_of(folder, "relatives")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["tasks" in line for line in lines] == [True, False, True, False]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert lines[1]["kl"] > 0


@pytest.mark.parametrize(
    "options",
    [{"average": "responses", "ratio": "sequence", "updates_per_rollout": 2, "clip_low": 0.01, "clip_high": 0.01},
     {"average": "constant", "baseline": "batch", "normalise": "batch", "surrogate": "cispo", "updates_per_rollout": 2, "clip_high": 0.01,
      "overlong_buffer_tokens": 6}],
    ids=["gspo", "cispo"],
)  # fmt: skip
def test_the_divisor_of_a_relative_does_not_depend_on_packs(folder, options):
    """Groups that are split over packs, each with its own prompt, and groups that share one pack."""
    figures = []
    for length in (512, 96):
        name = f"{options['average']}-{length}"
        run(rl_recipe(folder, 2, options, sequence_length=length), folder, name)
        figures.append([(line["loss"], line["grad_norm"], line["clipped"]) for line in figures_of(folder, name)])
    assert np.array(figures[0]) == pytest.approx(np.array(figures[1]), rel=1e-4, abs=1e-6)
    assert all(norm > 0 for _, norm, _ in figures[0])
    assert figures[0][1][2] > 0  # the second update is clipped


def test_too_many_failed_rewards_stop_the_stage(folder):
    rewards = {"digits": [{"name": "rl_rules:failing"}], "capitals": [{"name": "rl_rules:share_of_capitals"}]}
    with pytest.raises(RewardFailures, match="rl_rules:failing"):
        run(rl_recipe(folder, rewards=rewards), folder, "failing")
    # Within the limit the failed groups are left out and the others train.
    recipe = rl_recipe(folder, 1, {"max_reward_failure_rate": 1.0}, rewards=rewards)
    run(recipe, folder, "tolerant")
    (line,) = figures_of(folder, "tolerant")
    assert line["tasks"]["digits"]["reward_failures"] == 1.0
    assert line["groups_unjudged"] > 0
    assert Path(folder / "tolerant" / "result.json").is_file()


class JudgeOfDigits(BaseHTTPRequestHandler):
    """A reward service that says what rl_rules.share_of_digits says, until it has answered `answers_left` requests."""

    answers_left = 0

    def do_POST(self):
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        values = rl_rules.share_of_digits([RewardItem("", item["response"], None) for item in items])
        body = json.dumps({"scores": [{"value": value} for value in values]}).encode()
        JudgeOfDigits.answers_left -= 1
        self.send_response(200 if JudgeOfDigits.answers_left >= 0 else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Quiet."""


def test_a_dead_reward_service_stops_the_stage_which_goes_on_when_it_is_back(folder, undisturbed):
    server = ThreadingHTTPServer(("127.0.0.1", 0), JudgeOfDigits)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    options = {"url": url, "task": "digits", "attempts": 2, "pause_seconds": 0.01}
    rewards = {"digits": [{"name": "remote", "options": options}], "capitals": [{"name": "rl_rules:share_of_capitals"}]}
    recipe = rl_recipe(folder, rewards=rewards)
    try:
        JudgeOfDigits.answers_left = 2 * 4 + 3  # the evaluation before the stage, and a part of the iterations
        with pytest.raises(RewardServiceError, match="2 attempts"):
            run(recipe, folder, "dead-service")
        done = figures_of(folder, "dead-service")
        assert done == undisturbed[: len(done)], "no iteration counted an answer that was not judged"
        assert len(done) < 3
        JudgeOfDigits.answers_left = 1000
        run(recipe, folder, "dead-service")
    finally:
        server.shutdown()
        server.server_close()
    assert figures_of(folder, "dead-service") == undisturbed


def test_what_is_not_offered_is_refused_before_anything_runs(folder):
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(InputError, match="vllm is not installed"):
            run(rl_recipe(folder, grpo={"engine": "vllm"}), folder, "refused")
    with pytest.raises(InputError, match="no_such_reward"):
        run(rl_recipe(folder, rewards={"digits": [{"name": "no_such_reward"}]}), folder, "refused")


def test_the_order_of_prompts_goes_on_from_its_state(folder):
    recipe, prepared = rl_recipe(folder, grpo={"easy_pool_probability": 0.3}), load_prepared(folder / "data")
    whole, parts = PromptOrder(recipe, 0, prepared), PromptOrder(recipe, 0, prepared)
    for order in (whole, parts):
        order.pool.record(("digits", 3), 1.0)
    drawn = whole.draw(60, Counter())
    assert {one.key[0] for one in drawn} == {"digits", "capitals"}
    first = parts.draw(25, Counter())
    again = PromptOrder(recipe, 0, prepared)
    again.restore(json.loads(json.dumps(parts.state())))
    rest = again.draw(35, Counter())
    assert [one.key for one in first + rest] == [one.key for one in drawn]
    assert [one.key for one in drawn].count(("digits", 3)) > 8  # the pool gives it, the order does not
    other = rl_recipe(folder, pixels={"min": 784, "max": 3136})
    with pytest.raises(InputError, match="order of prompts"):
        PromptOrder(other, 0, prepared).restore(parts.state())
