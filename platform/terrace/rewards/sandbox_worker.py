"""The subprocess side of the sandbox: reads one JSON line per request, answers one JSON line per item.

Run as `python -m terrace.rewards.sandbox_worker MEMORY_BYTES ITEM_SECONDS SCRATCH`. Two processes: a *guard*, which holds no
rule, sets up the namespaces, adopts orphans and ends everything that is left when it is told to (SIGTERM) or when its child
ends; and the child, confined, which judges. The kernel enforces the limits: an alarm that is left at its default action ends
the process, so that an endless expression dies even if everything above it is gone.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from types import FrameType

from terrace.rewards import confinement
from terrace.rewards.environment import step_of
from terrace.rewards.registry import load_reward
from terrace.rewards.types import RewardItem, plain_value


def _judge(rule, item: RewardItem, options: dict) -> dict:
    try:
        values = rule([item], **options)
        if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__"):
            return {"failure": f"the rule returned {type(values).__name__} for 1 item; it must return a list of one number or None"}
        if len(values) != 1:
            return {"failure": f"the rule returned {len(values)} values for 1 item; it must return one for each"}
        value = values[0]
    except MemoryError:
        return {"failure": "memory limit", "restart": True}
    except RecursionError:
        return {"failure": "nested too deep"}
    except Exception as error:
        # A rule's mistake is one counted failure with its reason; the caller stops the stage when there are too many.
        return {"failure": f"{type(error).__name__}: {str(error)[:200]}"}
    number = plain_value(value)
    if number is None and value is not None:
        return {"failure": f"the rule returned {str(value)[:60]!r} ({type(value).__name__}), which is no number"}
    return {"value": number, "read": str(getattr(value, "read", ""))[:500], "rule": str(getattr(value, "rule", ""))[:200]}


def serve(item_seconds: float, held: list[str]) -> None:
    """Judge requests from standard input until it ends, or until memory ran out."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a rule prints must not look like an answer
    os.set_inheritable(answers.fileno(), False)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setrecursionlimit(5_000)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        rule = load_reward(request["rule"])
        warm_up = getattr(importlib.import_module(rule.__module__), "warm_up", None)
        if warm_up is not None:
            warm_up()
        answers.write(json.dumps({"ready": True, "held": held}).encode() + b"\n")
        for fields in request["items"]:
            signal.setitimer(signal.ITIMER_REAL, 2 * item_seconds + 1)
            confinement.limit_cpu(2 * item_seconds + 1)
            begun = time.perf_counter()
            if request.get("steps"):
                answer = step_of(rule, fields, request["options"])
            else:
                answer = _judge(rule, RewardItem(*fields), request["options"])
            answer["seconds"] = time.perf_counter() - begun
            signal.setitimer(signal.ITIMER_REAL, 0)
            answers.write(json.dumps(answer).encode() + b"\n")
            if answer.get("restart"):
                return


def _end_children() -> None:
    """End every process below this one. Orphans come here (subreaper), so the loop ends with the last of them."""
    while children := confinement.children_of(os.getpid()):
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for child in children:
            try:
                os.waitpid(child, 0)
            except ChildProcessError:
                continue


def _end_with(status: int) -> None:
    """End as the child ended: by the same signal, or with the same exit status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def _confined(arguments: list[str], namespaces: list[str], held: list[str], guard: int) -> None:
    """The process that judges: confined, then serving. Never returns."""
    memory_bytes, item_seconds, scratch = int(arguments[0]), float(arguments[1]), arguments[2]
    os.chdir(scratch)
    held = held + confinement.limit(memory_bytes) + confinement.drop_rights("user" in namespaces, guard)
    held += confinement.fence_off(scratch) + confinement.filter_calls()
    confinement.die_with_parent()
    serve(item_seconds, held)
    os._exit(0)


def _first_process(arguments: list[str], namespaces: list[str], held: list[str], guard: int, status_to: int) -> None:
    """The first process of a process id namespace. The kernel spares it signals from within, so it must not judge: it starts the
    process that does, reaps orphans, and tells the guard how that process ended. With it the kernel ends all others."""
    confinement.die_with_parent()
    if "mount" in namespaces:
        confinement.own_proc()
    child = os.fork()
    if child == 0:
        os.close(status_to)
        _confined(arguments, namespaces, held, guard)
    os.close(0)
    os.close(1)
    ended, status = 0, 0
    while ended != child:
        ended, status = os.waitpid(-1, 0)
    os.write(status_to, str(status).encode())
    os._exit(0)


def main() -> None:
    arguments, guard = sys.argv[1:4], os.getpid()
    confinement.be_subreaper()
    namespaces = confinement.unshared()
    held = [f"{name} namespace" for name in namespaces]
    if "mount" in namespaces:
        held += confinement.read_only(arguments[2])
    status_from, status_to = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(status_from)
        if "pid" in namespaces:
            _first_process(arguments, namespaces, held, guard, status_to)
        os.close(status_to)
        _confined(arguments, namespaces, held, guard)

    def stop(_number: int, _frame: FrameType | None) -> None:
        _end_children()
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(0)
    os.close(1)
    os.close(status_to)
    _, status = os.waitpid(child, 0)
    told = os.read(status_from, 20)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_children()
    _end_with(int(told) if told else status)


if __name__ == "__main__":
    main()
