"""The rule rewards of whole families: text in pictures, charts, captions, counts over images, tool calls, GUI actions, programs."""

from __future__ import annotations

import json

import pytest

from terrace.rewards.ready import stated_solution
from terrace.rewards.registry import BUILT_IN, load_reward
from terrace.rewards.rules.unit_tests import cases_of, difficulty_value
from terrace.rewards.sandbox import SandboxPool
from terrace.rewards.types import RewardItem

SEEN = {"image_sizes": [[400, 300]], "model_sizes": [[200, 150]]}


def value_of(rule, response, solution, metadata=None, **options):
    [judged] = load_reward(rule)([RewardItem("", response, solution, metadata or {})], **options)
    return judged


@pytest.mark.parametrize(
    ("response", "solution", "options", "value"),
    [
        ("kitten", "kitten", {}, 1),
        ("sitting", "kitten", {}, 4 / 7),
        ("", "kitten", {}, 0),
        ("KITTEN", "kitten", {}, 0),
        ("a  b\nc", "a b c", {}, 1),
        ("KITTEN", "kitten", {"case_sensitive": False}, 1),
        ("sitting", "kitten", {"least": 0.6}, 0),
        ("Main Street", ["Main St.", "Main Street"], {}, 1),
        ("<think>It says x</think>kitten", "kitten", {}, 1),
        ("<think>kitten", "kitten", {}, 0),
        ("The text reads:\n<answer>kitten</answer>", "kitten", {}, 1),
        ("{", "{", {}, 1),
        ("the answer is 5", "the answer is 5", {}, 1),
        ("42", 42, {}, 1),
        ("x", None, {}, None),
        ("x", "", {}, None),
        ("店铺营业中", "店铺营业", {}, 0.8),
    ],
)
def test_ocr(response, solution, options, value):
    assert value_of("ocr", response, solution, **options) == pytest.approx(value)


@pytest.mark.parametrize(
    ("response", "solution", "options", "value"),
    [
        ("104", "100", {}, 1),
        ("106", "100", {}, 0),
        ("The value is 12.4%.", "12", {}, 1),
        ("12K", "12,000", {}, 1),
        ("0.01", "0", {}, 0),
        ("0", "0", {}, 1),
        ("Germany.", "germany", {}, 1),
        ("France", "Germany", {}, 0),
        ("2008", "2010", {}, 1),
        ("2008", "2010", {"tolerance": 0}, 0),
        ("\\boxed{20}", ["21", "3"], {}, 1),
        ("20 or 30", "20", {}, 0),
        ("", "20", {}, 0),
        ("20", None, {}, None),
        ("-20", "20", {}, 0),
        ("3 million", "3,050,000", {}, 1),
    ],
)
def test_chart(response, solution, options, value):
    assert value_of("chart", response, solution, **options) == value


WORDS = ["red ball", ["dog", "puppy"], "grass"]


@pytest.mark.parametrize(
    ("response", "solution", "options", "value"),
    [
        ("A puppy chases a red ball over the grass.", WORDS, {}, 1),
        ("A dog on grass sleeps.", WORDS, {}, 2 / 3),
        ("Red balls and dogs lie there.", WORDS, {}, 2 / 3),
        ("A cat sits on a chair.", WORDS, {}, 0),
        ("dog grass", WORDS, {}, 0),
        ("A red and a ball, hotdog, grasshopper", WORDS, {}, 0),
        ("word " * 3 + "a dog with a red ball in the grass " + "of many other things here " * 40, WORDS, {}, 0),
        ("A puppy chases a red ball over the green grass today.", {"keywords": WORDS, "most_words": 5}, {}, 5 / 11),
        ("A dog. " * 30, WORDS, {}, 0),
        ("<think>A dog, a red ball, grass", WORDS, {}, 0),
        ("一只狗在草地上", ["狗", "草地"], {}, 1),
        ("A dog.", [], {}, None),
        ("A dog.", "dog", {}, None),
        ("A big dog.", [""], {}, None),
    ],
)
def test_caption(response, solution, options, value):
    assert value_of("caption", response, solution, **options) == pytest.approx(value)


@pytest.mark.parametrize(
    ("response", "partial", "value"),
    [
        ("[3, 1, 0]", False, 1),
        ("3, 1, 0", False, 1),
        ("Image 1: 3, Image 2: 1, Image 3: 0", False, 1),
        ("Image 1: three\nImage 2: one\nImage 3: none", False, 1),
        ("图1：3，图2：1，图3：0", False, 1),
        ("<think>[1, 1, 1]</think>[3, 1, 0]", False, 1),
        ("\\boxed{3, 1, 0}", False, 1),
        ("<answer>[3, 1, 0]</answer>", False, 1),
        ("[3, 1, 1]", False, 0),
        ("[3, 1, 1]", True, 2 / 3),
        ("[3, 1]", True, 0),
        ("[3, 1, 0, 0]", True, 0),
        ("4", True, 0),
        ("", True, 0),
        ("[0, 1, 3]", True, 1 / 3),
        ("Image 1: 3, Image 1: 2, Image 2: 1, Image 3: 0", True, 0),
        ("Image 3: 0, Image 1: 3, Image 2: 1", False, 1),
        ("<think>[3, 1, 0]", False, 0),
        ("The first image has 3, the second 1", True, 0),
    ],
)
def test_counts_over_images(response, partial, value):
    assert value_of("image_counts", response, [3, 1, 0], partial=partial) == pytest.approx(value)
    assert value_of("image_counts", response, {"counts": ["3", 1, "none"]}, partial=partial) == pytest.approx(value)


CALL = {"name": "search", "arguments": {"query": "cats", "limit": 3, "exact": True, "tags": ["a", "b"]}}


def called(**changes):
    return json.dumps({"name": "search", "arguments": {**CALL["arguments"], **changes}})


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (json.dumps(CALL), 1),
        (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", 1),
        (f"```json\n{json.dumps(CALL)}\n```", 1),
        (f"I call {json.dumps(CALL)} now.", 1),
        (f"<think>{called(limit=9)}</think>{json.dumps(CALL)}", 1),
        (json.dumps({"function": CALL}), 1),
        (json.dumps([CALL]), 1),
        (called(limit=3.0), 1),
        (json.dumps({"name": "search", "arguments": json.dumps(CALL["arguments"])}), 1),
        (json.dumps({"arguments": CALL["arguments"], "name": "search"}), 1),
        (called(limit="3"), 0),
        (called(exact=1), 0),
        (called(tags=["b", "a"]), 0),
        (called(extra=None), 0),
        (called(query="Cats"), 0),
        ("search(cats)", 0),
        ("", 0),
        (json.dumps([CALL, CALL]), 0),
        (json.dumps({"name": "find", "arguments": CALL["arguments"]}), 0),
        (f"<think>{json.dumps(CALL)}", 0),
        ("{" * 5000, 0),
        (f"<tool_call>{json.dumps(CALL)[:-1]}</tool_call>", 0),
        (f"{json.dumps(CALL)} or {called(limit=4)}", 0),
    ],
)
def test_tool_calls(response, value):
    assert value_of("tool_call", response, CALL) == value
    assert value_of("tool_call", response, json.dumps(CALL)) == value


def test_several_tool_calls():
    other = {"name": "stop", "arguments": {}}
    both, reverse = ("\n".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls) for calls in ([CALL, other], [other, CALL]))
    assert [value_of("tool_call", text, [CALL, other]) for text in (both, reverse, json.dumps(CALL))] == [1, 1, 0]
    assert [value_of("tool_call", text, [CALL, other], ordered=True) for text in (both, reverse)] == [1, 0]
    assert value_of("tool_call", both, {"tool": "x"}) is None


CLICK = {"action": "click", "bbox": [100, 100, 200, 200]}


@pytest.mark.parametrize(
    ("response", "solution", "value"),
    [
        ({"action": "click", "start_point": [75, 75]}, CLICK, 1),
        ({"action": "click", "start_point": [150, 150]}, CLICK, 0),
        ({"action": "hover", "start_point": [75, 75]}, CLICK, 0),
        ({"action": "tap", "coordinate": [75, 75]}, CLICK, 1),
        ({"action": "click"}, CLICK, 0),
        ({"action": "click", "start_point": [75, 75, 80, 80]}, CLICK, 0),
        ({"action": "click", "start_point": [75, 75]}, {"action": "click", "start_point": [150, 150]}, 1),
        ({"action": "click", "start_point": [10, 140]}, {"action": "click", "start_point": [150, 150]}, 0),
        ({"action": "input", "text": " Hello  World"}, {"action": "input", "text": "hello world"}, 1),
        ({"action": "input", "text": "bye"}, {"action": "input", "text": "hello"}, 0),
        ({"action": "type", "content": "hello"}, {"action": "input", "text": "hello"}, 1),
        ({"action": "press", "keys": ["ctrl", "C"]}, {"action": "press", "keys": "C+Ctrl"}, 1),
        ({"action": "press", "keys": ["ctrl"]}, {"action": "press", "keys": ["ctrl", "c"]}, 0),
        ({"action": "scroll", "direction": "Down"}, {"action": "scroll", "direction": "down"}, 1),
        ({"action": "scroll", "direction": "up"}, {"action": "scroll", "direction": "down"}, 0),
        (
            {"action": "drag", "start_point": [75, 75], "end_point": [20, 20]},
            {"action": "drag", "bbox": [100, 100, 200, 200], "end_bbox": [0, 0, 80, 80]},
            1,
        ),
        (
            {"action": "drag", "start_point": [20, 20], "end_point": [75, 75]},
            {"action": "drag", "bbox": [100, 100, 200, 200], "end_bbox": [0, 0, 80, 80]},
            0,
        ),
        ({"action": "open", "app": "Mail"}, {"action": "open", "app": "mail"}, 1),
        ({"action": "appswitch", "app": "Mail"}, {"action": "appswitch", "app": "Maps"}, 0),
        ({"action": "wait"}, {"action": "wait"}, 1),
        ({"action": "finished", "status": "success"}, {"action": "finished"}, 1),
        ({"action": "fly"}, {"action": "wait"}, 0),
        ({"action": "longpress", "start_point": [75, 75]}, {"action": "longpress", "bbox": [100, 100, 200, 200]}, 1),
        ({"action": "select", "text": "Blue"}, {"action": "select", "text": "blue"}, 1),
        ({"action": "wait"}, {"action": "fly"}, None),
        ({"action": "wait"}, "wait", None),
    ],
)
def test_gui_actions(response, solution, value):
    assert value_of("gui_action", json.dumps(response), solution, SEEN) == value
    assert value_of("gui_action", f"<think>Look.</think>\n```json\n{json.dumps(response)}\n```", solution, SEEN) == value
    if value == 1:
        assert value_of("gui_action", json.dumps([response, response]), solution, SEEN) == 0.0


def test_gui_actions_in_relative_coordinates_and_with_a_share_for_the_type():
    said = json.dumps({"action": "click", "start_point": [375, 500]})
    assert value_of("gui_action", said, CLICK, SEEN, coordinates="relative_1000") == 1
    assert value_of("gui_action", json.dumps({"action": "click", "start_point": [1, 1]}), CLICK, SEEN, type_share=0.2) == 0.2
    assert value_of("gui_action", "no action", CLICK, SEEN, type_share=0.2) == 0


ADD = {
    "tests": [
        {"call": "add(1, 2)", "expect": 3, "pass_rate": 0.95},
        {"call": "add(-1, 1)", "expect": 0, "pass_rate": 0.9},
        {"call": "add('a', 'b')", "expect": "ab", "pass_rate": 0.5},
        {"call": "add([1], [2])", "expect": [1, 2], "pass_rate": 0.1},
    ],
    "reference": "def add(a, b):\n    return a + b",
}
ECHO = {"tests": [{"input": "3\n1 2 3\n", "output": "6\n", "group": 0}, {"input": "1\n-5\n", "output": "-5", "group": 1}]}


def test_shares_of_difficulty():
    tests = cases_of(ADD, groups=4)
    assert [test.group for test in tests] == [0, 0, 2, 3]
    for passed, strict, soft in (
        ([1, 1, 1, 1], 1, 1), ([0, 0, 0, 0], 0, 0), ([1, 1, 0, 1], 1 / 3, 2 / 3), ([1, 0, 1, 1], 0, 5 / 6), ([1, 1, 1, 0], 2 / 3, 2 / 3),
        ([1, 0, 0, 0], 0, 1 / 6), ([0, 0, 1, 1], 0, 2 / 3),
    ):  # fmt: skip
        assert difficulty_value(tests, passed, "strict") == pytest.approx(strict)
        assert difficulty_value(tests, passed, "soft") == pytest.approx(soft)
    assert difficulty_value(tests, [1, 1, 0, 0], "strict", weights=[1, 0, 3, 4]) == pytest.approx(1 / 8)
    for solution in ("", {"tests": []}, {"tests": [{"call": "f()"}]}, {"tests": [{"call": "f()", "expect": 1}]}, [1]):
        with pytest.raises(ValueError, match=r"test|JSON|Expecting"):
            cases_of(solution, groups=4)


@pytest.mark.parametrize(
    ("program", "solution", "scheme", "value"),
    [
        ("def add(a, b):\n    return a + b", ADD, "strict", 1),
        ("def add(a, b):\n    return a + b if isinstance(a, int) else None", ADD, "strict", 1 / 3),
        ("def add(a, b):\n    return a + b if not isinstance(a, str) else None", ADD, "soft", 2 / 3),
        ("def add(a, b):\n    return a + b if not isinstance(a, str) else None", ADD, "strict", 1 / 3),
        ("input()\nprint(sum(map(int, input().split())))", ECHO, "strict", 1),
        ("print(6)", ECHO, "soft", 0.5),
        ("while True: pass", ECHO, "soft", 0),
        ("import os\nos._exit(0)", ADD, "soft", 0),
        ("def add(a, b):\n    import sys, os\n    print('3'); os._exit(0)", ADD, "soft", 0),
        ("this is no program", ADD, "soft", 0),
        ("print('x' * 10**9)", ECHO, "soft", 0),
    ],
)
def test_programs_in_the_sandbox(program, solution, scheme, value):
    with SandboxPool(1, item_seconds=10) as pool:
        item = RewardItem("", f"<think>Hm.</think>Here:\n```python\n{program}\n```\n", solution)
        [outcome] = pool.judge("test_difficulty", [item], {"scheme": scheme, "seconds_per_test": 1.0})
    assert outcome.value == pytest.approx(value), outcome


def test_programs_that_are_none():
    assert value_of("test_difficulty", "add = lambda a, b: a + b", ADD) == 0
    assert value_of("test_difficulty", "<think>```python\nx\n```", ADD) == 0
    assert value_of("test_difficulty", "```python\nx\n```", {"tests": "x"}) is None


@pytest.mark.parametrize(
    ("rule", "solution", "metadata"),
    [
        ("ocr", "a {text} \\boxed{x}", {}),
        ("chart", "12%", {}),
        ("chart", ["Yes", "No"], {}),
        ("caption", WORDS, {}),
        ("image_counts", [3, 0], {}),
        ("tool_call", CALL, {}),
        ("tool_call", [CALL, {"name": "x", "arguments": {}}], {}),
        ("gui_action", CLICK, SEEN),
        ("gui_action", {"action": "press", "keys": "ctrl+c"}, SEEN),
        ("gui_action", {"action": "drag", "start_point": [1, 2], "end_point": [3, 4]}, SEEN),
        ("test_difficulty", ADD, {}),
        ("math", "x=2 or x=3", {}),
        ("grounding", [10, 20, 30, 40], SEEN),
        ("gui_point", {"bbox": [10, 20, 30, 40]}, SEEN),
        ("temporal_grounding", [3.5, 9], {}),
        ("counting", "twelve", {}),
    ],
)
def test_a_stated_solution_earns_full_value(rule, solution, metadata):
    assert rule in BUILT_IN
    item = RewardItem("", "", solution, metadata)
    response = stated_solution(rule, item, {})
    assert value_of(rule, response, solution, metadata) == pytest.approx(1.0)
