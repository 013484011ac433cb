"""The notice that a pod must go: a file beside the training process, left by the preStop hook, and waited for by it.

Kubernetes runs the hook of every pod of an attempt when Kueue takes the quota back, a node drains or the RayJob is deleted, and
only then sends SIGTERM, which Ray would pass on by killing its workers. So the hook leaves the notice and keeps the pod alive until
the trainer has answered (its checkpoint is written) or the grace is nearly over.

    python -m terrace.cluster.stop_notice --wait-seconds 85     # the hook
    stop_notice.requested()                                     # the trainer, between steps
    stop_notice.answer()                                        # the trainer, after its checkpoint
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

DEFAULT_FILE = "/tmp/terrace-stop"
POLL_SECONDS = 0.5


def notice_file() -> Path:
    return Path(os.environ.get("TERRACE_STOP_FILE", DEFAULT_FILE))


def _answer_file() -> Path:
    return notice_file().with_name(notice_file().name + "-answered")


def _active_file() -> Path:
    return notice_file().with_name(notice_file().name + "-active")


def begin() -> None:
    """The trainer starts on this pod: the hook of an idle pod need not wait."""
    for path in (notice_file(), _answer_file()):
        path.unlink(missing_ok=True)
    _active_file().touch()


def requested() -> str | None:
    """Why to stop, None to go on. Costs one stat."""
    return "the pod was told to go" if notice_file().exists() else None


def answer() -> None:
    """The trainer has saved what it can, or has ended: the pod may go."""
    _answer_file().touch()
    _active_file().unlink(missing_ok=True)


def wait(seconds: float) -> bool:
    """Leave the notice and wait for the answer; True when it came or nobody trains here."""
    notice_file().touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if _answer_file().exists() or not _active_file().exists():
            return True
        time.sleep(POLL_SECONDS)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description="Tell the trainer on this pod to checkpoint, and wait for it.")
    parser.add_argument("--wait-seconds", type=float, default=60.0)
    return 0 if wait(parser.parse_args().wait_seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
