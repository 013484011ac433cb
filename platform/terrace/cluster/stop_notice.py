"""The notice that a pod must go: a file beside the training processes, left by the preStop hook, and waited for by it.

Kubernetes runs the hook of every pod of an attempt when Kueue takes the quota back, a node drains or the RayJob is deleted, and
only then sends SIGTERM, which Ray would pass on by killing its workers; hook and SIGTERM share `terminationGracePeriodSeconds`
(kubernetes.io/docs/concepts/containers/container-lifecycle-hooks). So the hook leaves the notice and keeps the pod alive until
*every* training process of the pod has answered (its part of the checkpoint is written) or the grace is nearly over.

Each process announces itself by a file of its own, named by its process id; a process that died without an answer is not waited
for. The notice is never taken back: a process that begins after it stops at its first look. It belongs to one run of the
container (its first process), since the scratch folder outlives a container that is restarted in the same pod.

    python -m terrace.cluster.stop_notice --wait-seconds 85     # the hook
    stop_notice.begin()                                         # a training process, at its start
    stop_notice.requested()                                     # between steps
    stop_notice.answer()                                        # after its checkpoint, or at its end
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


def _active_folder() -> Path:
    return notice_file().with_name(notice_file().name + "-active")


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since the machine's boot; None where there is none (or only its remains)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def begin() -> None:
    """A training process starts on this pod: the hook waits for its answer. A notice that is there already stays."""
    path = _active_folder() / str(os.getpid())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(str(_started(os.getpid())))
    os.replace(temporary, path)  # never seen half written


def requested() -> str | None:
    """Why to stop, None to go on. Costs one stat while there is no notice."""
    try:
        noticed = notice_file().read_text()
    except FileNotFoundError:
        return None
    return "the pod was told to go" if noticed == str(_started(1)) else None


def answer() -> None:
    """This process has saved what it can, or has ended: as far as it is concerned the pod may go."""
    (_active_folder() / str(os.getpid())).unlink(missing_ok=True)


def unanswered() -> list[int]:
    """Ids of the processes that train here and have not answered; those that have died are no longer among them."""
    found = [(path.name, path.read_text()) for path in _active_folder().glob("[0-9]*")] if _active_folder().is_dir() else []
    return sorted(int(name) for name, started in found if _started(int(name)) == started)


def wait(seconds: float) -> list[int]:
    """Leave the notice and wait until all have answered; the ids of those that had not after `seconds`."""
    temporary = notice_file().with_name(f".{notice_file().name}-{os.getpid()}")
    temporary.write_text(str(_started(1)))
    os.replace(temporary, notice_file())
    end = time.monotonic() + seconds
    while (left := _left()) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return left


def _left() -> list[int]:
    try:
        return unanswered()
    except FileNotFoundError:  # one answered between the listing and the reading
        return _left()


def main() -> int:
    parser = argparse.ArgumentParser(description="Tell the training processes on this pod to checkpoint, and wait for all of them.")
    parser.add_argument("--wait-seconds", type=float, default=60.0)
    options = parser.parse_args()
    left = wait(options.wait_seconds)
    if left:  # what a failed hook prints is shown in the pod's event FailedPreStopHook
        print(f"processes {', '.join(map(str, left))} have not saved within {options.wait_seconds:g} s", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
