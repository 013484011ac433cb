"""What a rule must not be able to do in the sandbox, each tried by a rule that tries: with all that the kernel grants, and
without namespaces, as in an ordinary pod."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from terrace.errors import InputError
from terrace.rewards import sandbox
from terrace.rewards.ready import Prompt, unready
from terrace.rewards.sandbox import SandboxPool
from terrace.rewards.types import Judgement, RewardItem, outcomes_of

MARK = "terrace_escape_mark"
RULES = '''
import os, socket, subprocess, sys, time

def attempt(items, *, file=""):
    """1 where the attempt that the response names succeeds; what stops it is the failure's reason."""
    what = items[0].response
    if what == "environment":
        names = [name for name in os.environ if "SECRET" in name or "TOKEN" in name]
        for process in os.listdir("/proc"):
            if process.isdigit():
                try:
                    names += [process] if b"SECRET" in open(f"/proc/{process}/environ", "rb").read() else []
                except OSError:
                    pass
        return [float(bool(names))]
    if what == "socket":
        socket.socket().connect(("127.0.0.1", int(file)))
    if what == "fork":
        children = 0
        for _ in range(60):
            if os.fork() == 0:
                time.sleep(20)
                os._exit(0)
            children += 1
    if what == "large file":
        with open("large", "wb") as large:
            for _ in range(300):
                large.write(bytes(2**20))
    if what == "many files":
        opened = [open(f"small-{number}", "w") for number in range(1000)]
    if what == "file outside":
        open(file, "w").write("here")
    if what == "remove outside":
        os.remove(file)
    if what == "kill":
        os.kill(int(file), 15)
    if what == "privileges":
        os.setuid(0) if os.getuid() else os.setuid(1)
        os.chroot("/")
    if what == "memory":
        return [float(len(bytearray(3 << 30)) > 0)]
    if what == "mount":
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        return [float(libc.unshare(0x10000000) == 0 or libc.mount(b"none", b"/", None, 1 << 5, None) == 0)]
    return [1.0]

def leaving(items, *, mark):
    """Leave a grandchild in a session of its own, then never answer."""
    code = "import time; time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", code + "  # " + mark], start_new_session=True)
    if items[0].response == "wait":
        time.sleep(60)
    return [1.0]

def odd(items, *, kind):
    import numpy
    return {"float32": [numpy.float32(0.25)], "array": numpy.array([0.25]), "text": ["good"], "pair": [numpy.array([1.0, 0.5])],
            "scalar": 0.5, "none": [], "two": [0.1, 0.2], "boolean": [True], "dict": {"value": 1}}[kind]

def breaks(items):
    """Judges its own solution and never comes back from anything else."""
    if items[0].response != str(items[0].solution):
        time.sleep(60)
    return [1.0]
'''
WITHOUT_NAMESPACES = "import terrace.rewards.confinement as c; c.unshared = list; import terrace.rewards.sandbox_worker as w; w.main()"


@pytest.fixture(params=["all that the kernel grants", "no namespaces"])
def rules(request, monkeypatch, tmp_path):
    """The module of rules, importable in the sandbox; its worker with or without namespaces."""
    (tmp_path / "escaping_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("TERRACE_REWARD_TOKEN", "s3cr3t")
    if request.param == "no namespaces":
        monkeypatch.setattr(sandbox, "WORKER", ("-c", WITHOUT_NAMESPACES))
    return "escaping_rules"


def marked_processes(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_escapes_fail(rules, tmp_path):
    import socket

    (tmp_path / "mine").write_text("precious")
    outside = str(tmp_path / "written")
    with socket.socket() as server, SandboxPool(1, item_seconds=20) as pool:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        options = {"socket": port, "file outside": outside, "remove outside": str(tmp_path / "mine"), "kill": str(os.getpid())}
        attempts = [
            "environment", "socket", "large file", "many files", "file outside", "remove outside", "kill", "privileges", "mount",
            "memory", "fork",
        ]  # fmt: skip
        succeeded = {}
        for what in attempts:
            [outcome] = pool.judge(f"{rules}:attempt", [RewardItem("", what, None)], {"file": options.get(what, "")})
            if outcome.value:
                succeeded[what] = outcome
        [fine] = pool.judge(f"{rules}:attempt", [RewardItem("", "nothing", None)])
    assert succeeded == {}
    assert fine.value == 1.0
    assert not Path(outside).exists()
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("response", ["wait", "answer"])
def test_a_grandchild_in_its_own_session_does_not_survive(rules, response):
    mark = f"{MARK}_{os.getpid()}_{response}"
    with SandboxPool(1, item_seconds=1) as pool:
        [outcome] = pool.judge(f"{rules}:leaving", [RewardItem("", response, None)], {"mark": mark})
        assert (outcome.value is None) == (response == "wait")
        if response == "wait":
            assert "time limit" in outcome.failure
    deadline = time.monotonic() + 5
    while marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked_processes(mark) == []


def test_the_pool_says_what_holds_and_leaves_nothing(rules, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with SandboxPool(1) as pool:
        pool.judge("counting", [RewardItem("", "4", "4")])
        assert {"memory", "file size", "open files", "no new privileges"} <= set(pool.held)
        assert len(list(tmp_path.glob("terrace-sandbox-*"))) == 1
    assert list(tmp_path.glob("terrace-sandbox-*")) == []


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("float32", 0.25, ""), ("array", 0.25, ""), ("boolean", 1.0, ""), ("text", None, "'good' .str., which is no number"),
        ("pair", None, "is no number"), ("scalar", None, "returned float for 1 item"), ("none", None, "returned 0 values for 1 item"),
        ("two", None, "returned 2 values"), ("dict", None, "returned dict"),
    ],
)  # fmt: skip
def test_odd_values_are_numbers_or_named_failures(monkeypatch, tmp_path, kind, value, words):
    (tmp_path / "escaping_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    with SandboxPool(1) as pool:
        [outcome] = pool.judge("escaping_rules:odd", [RewardItem("", "", None)], {"kind": kind})
    assert outcome.value == value
    if words:
        import re

        assert re.search(words, outcome.failure), outcome.failure


def test_values_beside_the_sandbox_are_checked_alike():
    found = outcomes_of([np.float32(0.5), Judgement(0.25, "x", "y"), "good", np.array([1, 2]), None, float("nan"), True], "mine", 7)
    assert [outcome.value for outcome in found] == [0.5, 0.25, None, None, None, None, 1.0]
    assert (found[1].read, found[1].rule) == ("x", "y")
    assert "'good'" in found[2].failure
    with pytest.raises(InputError, match="reward 'mine' returned 2 values; it must return one for each of the 3 items"):
        outcomes_of([0.1, 0.2], "mine", 3)
    with pytest.raises(InputError, match="returned float"):
        outcomes_of(0.5, "mine", 1)


def test_a_response_that_breaks_the_judge_is_wrong_and_a_solution_that_does_is_a_failure(monkeypatch, tmp_path):
    (tmp_path / "escaping_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    with SandboxPool(1, item_seconds=1) as pool:
        items = [RewardItem("", "endless", "good"), RewardItem("", "good", "good"), RewardItem("", "endless", None)]
        outcomes = pool.judge("escaping_rules:breaks", items)
    assert [outcome.value for outcome in outcomes] == [0.0, 1.0, None]
    assert "the response breaks the judge: time limit" in outcomes[0].rule


def test_it_judges_in_a_process_that_has_many_files_open():
    """`select` refuses descriptors from 1,024 on, which a trainer with many sources and workers has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("needs 2,048 file descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with SandboxPool(1) as pool:
            assert [outcome.value for outcome in pool.judge("math", [RewardItem("", "\\boxed{4}", "4")])] == [1.0]
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_too_large_is_refused_at_once():
    """No time limit is spent on factorials, towers of powers, and sums that sympy would begin to compute."""
    towers = [
        r"1000000!", r"10^{10^{10^{10}}}", r"9^{9^{9^9}}", r"\int_0^1 x^{99999} dx", r"((9!)!)!", r"\sum_{k=1}^{10^{12}} k^{99}",
        r"\binom{10^9}{10^8}", r"2^{1000000007} \bmod 7", r"x^{x^{x^{x^x}}}",
    ]  # fmt: skip
    golds = ["5", r"\sqrt{2}", "x^2+1", r"\frac{1}{2004!}", r"\int_0^1 x dx", "y=2x", "(1,2)", r"\begin{pmatrix}1\\2\end{pmatrix}"]
    with SandboxPool(2, item_seconds=5) as pool:
        pool.judge("math", [RewardItem("", "1", "1")])
        begun = time.monotonic()
        outcomes = pool.judge("math", [RewardItem("", f"\\boxed{{{tower}}}", gold) for tower in towers for gold in golds])
        seconds = time.monotonic() - begun
    assert [outcome.value for outcome in outcomes] == [0.0] * len(outcomes)
    assert not [outcome for outcome in outcomes if "breaks" in outcome.rule]
    assert seconds < 5


class Rule:
    def __init__(self, name, options=None):
        self.name, self.options = name, options or {}


def test_prompts_are_ready_or_named():
    seen = {"image_sizes": [[400, 400]], "model_sizes": [[200, 200]]}
    box = {"bbox": [40, 60, 140, 260]}
    prompts = [
        Prompt("a", "math", "42", {}), Prompt("b", "math", r"\frac{1}{2}", {}),
        Prompt("c", "math", None, {}), Prompt("d", "maths", "4", {}),
        Prompt("e", "math", "B", {"choices": {"A": "x", "B": "y"}}), Prompt("f", "count", "many", {}), Prompt("g", "count", "4", {}),
        Prompt("h", "box", box, seen), Prompt("i", "box", {"bbox": [4, 4, 4, 9]}, seen), Prompt("j", "box", "left", seen),
        Prompt("k", "point", box, seen), Prompt("l", "span", "[00:10,00:20]", {}), Prompt("m", "span", "[00:20,00:10]", {}),
        Prompt("n", "form", None, {}), Prompt("o", "math", ["a cat", "cat"], {}), Prompt("p", "relative", box, {}),
        Prompt("q", "math", 4.5, {}),
        Prompt("r", "math", r"\begin{cases} x & \text{broken", {}),
    ]  # fmt: skip
    rewards = {
        "math": [Rule("math")], "count": [Rule("counting")], "box": [Rule("grounding"), Rule("format", {"form": "boxed"})],
        "point": [Rule("gui_point", {"coordinates": "relative_1000"})], "span": [Rule("temporal_grounding")], "form": [Rule("format")],
        "relative": [Rule("grounding", {"coordinates": "relative_1000"})],
    }  # fmt: skip
    with SandboxPool(1) as pool:
        problems = {problem.id: str(problem) for problem in unready(prompts, rewards, pool.judge)}
    assert list(problems) == ["c", "d", "f", "i", "j", "m", "p", "r"]
    assert "prompt c (task math): it has no `solution`, which the reward math needs" in problems["c"]
    assert "its task has no reward" in problems["d"]
    assert "cannot read the solution 'many'" in problems["f"]
    assert "relative coordinates need metadata model_sizes" in problems["p"]
