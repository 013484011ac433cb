"""Rule rewards on the torture set, the sandbox's limits, and the router's honesty about failures."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from torture_set import CASES

from terrace.errors import InputError
from terrace.recipe.schema_grpo import RewardRule
from terrace.rewards.router import Router
from terrace.rewards.sandbox import SandboxError, SandboxPool
from terrace.rewards.types import RewardItem

ITEM_SECONDS = 4.0


@pytest.fixture(scope="module")
def pool():
    with SandboxPool(workers=2, item_seconds=ITEM_SECONDS) as pool:
        yield pool


@pytest.fixture(scope="module")
def outcomes(pool):
    """Every case judged once, in batches per rule and options; with the seconds that all of it took."""
    begun, results = time.monotonic(), [None] * len(CASES)
    groups: dict[tuple, list[int]] = {}
    for place, case in enumerate(CASES):
        groups.setdefault((case.rule, tuple(sorted(case.options.items()))), []).append(place)
    for (rule, options), places in groups.items():
        items = [RewardItem("", CASES[p].response, CASES[p].solution, CASES[p].metadata) for p in places]
        for place, outcome in zip(places, pool.judge(rule, items, dict(options))):
            results[place] = outcome
    return results, time.monotonic() - begun


def test_the_torture_set_has_two_hundred_cases():
    assert len(CASES) >= 200


@pytest.mark.parametrize("place", range(len(CASES)), ids=lambda p: f"{p}-{CASES[p].rule}-{CASES[p].response[:24]!r}")
def test_torture_case(outcomes, place):
    expected, outcome = CASES[place].expected, outcomes[0][place]
    if expected is None:
        assert outcome.value is None
        assert outcome.failure
    else:
        assert outcome.value == pytest.approx(expected, abs=1e-9), outcome


def test_torture_set_takes_bounded_time(outcomes):
    killed = sum(outcome.failure is not None and "time limit" in outcome.failure for outcome in outcomes[0])
    assert killed <= 3
    assert outcomes[1] < 60


def test_an_endless_item_costs_one_timeout_and_the_rest_is_judged(pool):
    items = [RewardItem("", "4", "4"), RewardItem("", "a" * 40 + "!", None), RewardItem("", "b", None)]
    begun = time.monotonic()
    outcomes = pool.judge("format", items, {"form": "regex", "pattern": "(a+)+$|b|4"})
    assert [outcome.value for outcome in outcomes] == [1.0, None, 1.0]
    assert "time limit" in outcomes[1].failure
    assert time.monotonic() - begun < ITEM_SECONDS + 20


def hungry(items):
    """A rule that takes as much memory as the response says, in MiB."""
    return [float(len(bytearray(int(item.response) * 2**20)) > 0) for item in items]


def dying(items):
    """A rule that ends its process, answers out of range, or raises, as the response says."""
    response = items[0].response
    if response == "die":
        os.kill(os.getpid(), 11)
    if response == "raise":
        raise KeyError("missing")
    return [{"two": 2.0, "nan": float("nan"), "none": None}.get(response, 0.5)]


def slow(items):
    """A rule that takes a second for each item."""
    time.sleep(len(items))
    return [1.0] * len(items)


@pytest.fixture
def importable(monkeypatch, tmp_path):
    """This file's rules as a module that the sandbox can import."""
    source = Path(__file__).read_text()
    body = source[source.index("def hungry") : source.index("@pytest.fixture\ndef importable")]
    (tmp_path / "terrace_test_rules.py").write_text("import os\nimport time\n\n" + body)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "terrace_test_rules"


def test_memory_limit_and_crashes_are_failures_with_a_reason(importable):
    with SandboxPool(workers=1, item_seconds=10, memory_bytes=2**29) as pool:
        big, small = pool.judge(f"{importable}:hungry", [RewardItem("", "4096", None), RewardItem("", "1", None)])
        assert (big.value, small.value) == (None, 1.0)
        assert "memory limit" in big.failure
        answers = ["die", "fine", "raise", "two", "nan", "none", "fine"]
        outcomes = pool.judge(f"{importable}:dying", [RewardItem("", answer, None) for answer in answers])
    assert [outcome.value for outcome in outcomes] == [None, 0.5, None, None, None, None, 0.5]
    reasons = [outcome.failure for outcome in outcomes]
    assert "signal 11" in reasons[0]
    assert "KeyError" in reasons[2]
    assert "outside [0, 1]" in reasons[3]
    assert "could not judge" in reasons[5]


def test_closing_frees_who_waits(importable):
    """A stage that stops while rewards are under way must end, not wait for outcomes that no process will ever give."""
    pool = SandboxPool(workers=1, item_seconds=10)
    router = Router({task: [RewardRule(name=f"{importable}:slow")] for task in "ab"}, pool)
    items = [("a", RewardItem("", "", None))] * 3 + [("b", RewardItem("", "", None))] * 3
    waiting = [router.submit(items) for _ in range(3)]
    time.sleep(0.5)
    router.close()
    pool.close()
    for future in waiting:
        with pytest.raises(SandboxError, match="closed"):
            future.result(timeout=20)
    with pytest.raises(SandboxError, match="closed"):
        pool.judge(f"{importable}:slow", [RewardItem("", "", None)])


def test_router_picks_by_task_weights_and_counts_failures(pool, importable):
    # The pool's processes were started before the module existed on their path, so this one brings its own.
    with SandboxPool(workers=1) as own:
        router = Router(
            {
                "counting": [
                    RewardRule(name="counting", weight=3),
                    RewardRule(name="format", options={"form": "boxed"}),
                ],
                "odd": [RewardRule(name="counting"), RewardRule(name=f"{importable}:dying")],
            },
            own,
        )
        pairs = [
            ("counting", RewardItem("", "\\boxed{4}", "4")),
            ("odd", RewardItem("", "raise", "4")),
            ("counting", RewardItem("", "4", "4")),
            ("odd", RewardItem("", "4", "4")),
        ]
        scores = router.submit(pairs).result(timeout=120)
        assert [score.value for score in scores] == [1.0, None, 0.75, 0.75]
        assert scores[1].parts == {"counting": 0.0, f"{importable}:dying": None}
        assert router.counts["odd"].failed == 1
        assert router.counts["odd"].failure_rate == 0.5
        assert router.counts["counting"].failed == 0
        with pytest.raises(InputError, match="captioning"):
            router.score([("captioning", RewardItem("", "", ""))])
        router.close()


def test_unknown_rewards_are_refused_before_anything_runs(pool):
    with pytest.raises(InputError, match="counting"):
        Router({"task": [RewardRule(name="no_such_rule")]}, pool)
    with pytest.raises(InputError, match="cannot import"):
        Router({"task": [RewardRule(name="terrace.rewards.nothing:rule")]}, pool)


def test_gold_answers_of_real_prompts_earn_their_reward(pool, shared_data):
    """Every solution of the real reinforcement-learning prompts, written as a plain and as a boxed answer."""
    for name, rule in (("text_math", "text_reasoning"), ("visual_math", "visual_reasoning"), ("counting", "counting")):
        rows = [json.loads(line) for line in (shared_data / "rl" / f"{name}.jsonl").read_text().split("\n") if line][
            :250
        ]
        for form in ("\\boxed{%s}", "The answer is $%s$"):
            items = [
                RewardItem("", form % row["solution"], row["solution"], {"tolerance": row.get("tolerance")})
                for row in rows
            ]
            values = [outcome.value for outcome in pool.judge(rule, items)]
            wrong = [row["solution"] for row, value in zip(rows, values) if value != 1.0]
            assert len(wrong) <= 0.02 * len(rows), wrong
    for name, rule in (("grounding", "grounding"), ("gui", "gui_point")):
        rows = [json.loads(line) for line in (shared_data / "rl" / f"{name}.jsonl").read_text().split("\n") if line]
        boxes = [row["solution"]["bbox"] for row in rows]
        said = [b if rule == "grounding" else [(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in boxes]
        items = [RewardItem("", str(answer), row["solution"]) for answer, row in zip(said, rows)]
        assert all(outcome.value == pytest.approx(1.0) for outcome in pool.judge(rule, items))
