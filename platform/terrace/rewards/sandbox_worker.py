"""The subprocess side of the sandbox: reads one JSON line per request, answers one JSON line per item.

Run as `python -m terrace.rewards.sandbox_worker MEMORY_BYTES ITEM_SECONDS`. The kernel enforces both limits: RLIMIT_AS
for memory, and an alarm that is left at its default action (it ends the process), so that an endless expression dies
even if the parent is gone.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys

from terrace.rewards.registry import load_reward
from terrace.rewards.types import Judgement, RewardItem, plain_value


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setrecursionlimit(5_000)


def _judge(rule, item: RewardItem, options: dict) -> dict:
    try:
        (value,) = rule([item], **options)
    except MemoryError:
        return {"failure": "memory limit", "restart": True}
    except RecursionError:
        return {"failure": "nested too deep"}
    except Exception as error:
        # A rule's mistake is one counted failure with its reason; the caller stops the stage when there are too many.
        return {"failure": f"{type(error).__name__}: {str(error)[:200]}"}
    judged = value if isinstance(value, Judgement) else Judgement(value)
    number = plain_value(judged.value)
    if number is None and judged.value is not None:
        return {"failure": f"the rule returned {str(judged.value)[:60]!r} ({type(judged.value).__name__}), which is no number"}
    return {"value": number, "read": str(judged.read)[:500], "rule": str(judged.rule)[:200]}


def main() -> None:
    memory_bytes, item_seconds = int(sys.argv[1]), float(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a rule prints must not look like an answer
    _limit(memory_bytes)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        rule = load_reward(request["rule"])
        warm_up = getattr(importlib.import_module(rule.__module__), "warm_up", None)
        if warm_up is not None:
            warm_up()
        answers.write(b'{"ready": true}\n')
        for fields in request["items"]:
            signal.setitimer(signal.ITIMER_REAL, 2 * item_seconds + 1)
            answer = _judge(rule, RewardItem(*fields), request["options"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            answers.write(json.dumps(answer).encode() + b"\n")
            if answer.get("restart"):
                return


if __name__ == "__main__":
    main()
