"""Runs that are struck at a random moment, and end with the same weights as the run that nothing disturbed.

A stage on two workers is trained by `terrace run`, on a disk or on S3. At a random step something is killed with SIGKILL: a worker,
the driver, the raylet, or everything at once in the middle of a checkpoint; or everything is frozen (SIGSTOP) until another controller
on another machine has taken over and finished, and is then woken up. The same command is repeated until it succeeds, on S3 each
time on a machine whose disk is empty. Every metrics line and every byte of the final weights must be the undisturbed run's.

    python tests/chaos/chaos.py --runs 20 --record /tmp/chaos.json --write docs/reliability.md
    python tests/chaos/chaos.py --runs 5 --first 10 --record /tmp/chaos.json     # a part of them; the record holds all so far
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import yaml

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "e2e"), str(REPOSITORY / "platform")]

import s3_server  # noqa: E402
from e2e_runs import SOURCES  # noqa: E402

from terrace.storage.conditional import list_objects, read_versioned  # noqa: E402
from terrace.storage.mirror import local_folder  # noqa: E402
from terrace.storage.s3 import s3  # noqa: E402

STEPS = 24
STAGE = "stages/01-projector-warmup"
BUCKET = "terrace-chaos"
KINDS = ("worker", "driver", "raylet", "checkpoint", "ghost")
PATIENCE_S = 1200.0  # a busy machine takes minutes to start two workers


@dataclass
class Strike:
    """One run: what was struck where and when, and how it ended."""

    number: int
    kind: str
    storage: str
    step: int  # newest metrics line when it struck
    attempts: int = 0
    commands: int = 0  # times the command was started
    seconds: float = 0.0
    equal: bool = False
    note: str = ""


# ---------------------------------------------------------------- the run and its machines


@dataclass
class Bench:
    """Where the recipe, the corpus and the runs lie."""

    folder: Path
    server: s3_server.S3Server

    def prepare(self) -> None:
        """The tiny recipe's first stage on two workers, and a corpus drawn once."""
        from terrace.demo.corpus import write_corpus

        if not (self.folder / "recipe.yaml").exists():
            corpus = write_corpus(self.folder / "corpus", seed=1, samples={"captions": 60}, workers=1)
            recipe = yaml.safe_load((HERE.parent / "recipes" / "tiny.yaml").read_text())
            recipe["data"]["sources"] = {
                "captions": {**recipe["data"]["sources"]["captions"], "uri": str(corpus / f"{SOURCES['captions']}.jsonl")}
            }
            recipe["stages"] = [recipe["stages"][0] | {
                "budget": {"steps": STEPS}, "resources": {"workers": 2}, "data_loading": {"engine": "inline"},
                "failure": {"backoff_seconds": 0.5, "stall_timeout_seconds": 900},
            }]  # fmt: skip
            (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    def environment(self, machine: str) -> dict[str, str]:
        """Of a machine whose disk holds nothing yet, except what a shared disk gives it."""
        return {
            **os.environ, **s3_server.ACCESS, "AWS_ENDPOINT_URL": self.server.url,
            "XDG_CACHE_HOME": str(self.folder / "machines" / machine),
            "PYTHONPATH": str(REPOSITORY / "platform"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def start(self, place: str, machine: str) -> subprocess.Popen:
        """The command, on a machine with a host name of its own where the kernel allows that."""
        words = [sys.executable, "-m", "terrace.cli", "run", str(self.folder / "recipe.yaml"), "--run-dir", place]
        if hostnames_are_ours():
            words = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', machine, *words]
        with open(self.folder / "log.txt", "ab") as log:
            log.write(f"\n=== {place} on {machine}\n".encode())
            log.flush()
            return subprocess.Popen(words, env=self.environment(machine), stdout=log, stderr=log, start_new_session=True, cwd=REPOSITORY)

    def disk(self, place: str, machine: str) -> Path:
        """The run's folder as this machine sees it."""
        if not place.startswith("s3://"):
            return Path(place)
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = self.environment(machine)["XDG_CACHE_HOME"]
        try:
            return local_folder(place)
        finally:
            os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


def hostnames_are_ours() -> bool:
    probe = ["unshare", "--uts", "sh", "-c", "hostname terrace-probe && hostname"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The process and everything it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def wait_until(due: Callable[[], bool], process: subprocess.Popen) -> bool:
    """False when the run ended by itself before."""
    deadline = time.monotonic() + PATIENCE_S
    while not due():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"the moment to strike did not come within {PATIENCE_S:.0f} s")
        time.sleep(0.005)
    return True


def steps_done(disk: Path) -> int:
    path = disk / STAGE / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def writes_a_checkpoint(disk: Path) -> bool:
    return any((disk / STAGE / "checkpoints").glob(".writing-*"))


# ---------------------------------------------------------------- what must be equal


def outcome(place: str) -> str:
    """A digest of the metrics (step, loss, tokens) and of the final weights' bytes."""
    if place.startswith("s3://"):
        files = {entry.name: read_versioned(f"{place}/{STAGE}/{entry.name}") for entry in list_objects(f"{place}/{STAGE}")
                 if entry.name == "metrics.jsonl" or entry.name.startswith("final/")}  # fmt: skip
        contents = {name: found[0] for name, found in files.items() if found is not None}
    else:
        folder = Path(place) / STAGE
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in [folder / "metrics.jsonl", *folder.glob("final/*")]}
    rows = [json.loads(line) for line in contents["metrics.jsonl"].splitlines()]
    values = [[row["step"], row["loss"], row["tokens"], row["samples"]] for row in rows]
    assert [row[0] for row in values] == list(range(1, STEPS + 1)), f"steps in metrics.jsonl: {[row[0] for row in values]}"
    weights = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items()) if name.endswith(".safetensors")}
    assert weights, f"{place} has no final weights"
    return hashlib.sha256(json.dumps([values, weights]).encode()).hexdigest()


def everything(place: str) -> dict[str, str]:
    """Every file that a ghost could spoil, by digest: all but its own attempt's folders, and the checkpoint that it was writing, which
    has no name yet (on S3: which the fence does not list) and which the next attempt removes."""
    if place.startswith("s3://"):
        listed = json.loads(read_versioned(f"{place}/{STAGE}/checkpoints/attempt.json")[0])["complete"]
        complete = {f"step-{int(step):06d}/attempt-{entry['attempt']:03d}" for step, entry in listed.items()}
        counts = lambda name: "/checkpoints/step-" not in name or "/".join(name.split("/")[3:5]) in complete  # noqa: E731
        return {entry.name: entry.version for entry in list_objects(place) if "/attempts/" not in entry.name and counts(entry.name)}
    own = ("/attempts/", "/ray/", "/hang/", "/.writing-")
    names = [path for path in Path(place).rglob("*") if path.is_file() and not any(part in str(path) for part in own)]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in names if "mlflow" not in path.name and path.name[0] != "."}


# ---------------------------------------------------------------- one strike


def strike(bench: Bench, number: int, seed: int, expected: str) -> Strike:
    dice = random.Random(seed * 1000 + number)
    kind, storage = KINDS[number % len(KINDS)], ("disk", "S3")[(number // len(KINDS)) % 2]
    place = str(bench.folder / f"run-{number}") if storage == "disk" else f"s3://{BUCKET}/run-{number}"
    started, machine = time.monotonic(), f"chaos-{number}-0"
    target, jitter = dice.randrange(0, STEPS), dice.uniform(0, 0.15)
    process = bench.start(place, machine)
    disk = bench.disk(place, machine)
    alive = lambda: any((disk / STAGE).glob("attempts/*/alive-*.json"))  # noqa: E731
    due = lambda: alive() and steps_done(disk) >= target  # noqa: E731
    if kind == "checkpoint":
        target = min(target, STEPS - 2)
        due = lambda: steps_done(disk) >= target and writes_a_checkpoint(disk)  # noqa: E731
    result = Strike(number, kind, storage, 0)
    if wait_until(due, process):
        time.sleep(0 if kind == "checkpoint" else jitter)
        result.step = steps_done(disk)
        try:
            result.note = hit(bench, kind, process, disk, place, dice, result)
        except AssertionError as error:
            result.note = f"**{error}**"
    else:
        result.note = "it ended before it could be struck"
    carry_on(bench, process, place, result)
    with contextlib.suppress(AssertionError):
        result.equal = outcome(place) == expected and not result.note.startswith("**")
    result.seconds = round(time.monotonic() - started, 1)
    events = journal(place)
    result.attempts = sum(event["event"] == "stage_attempt_started" for event in events)
    return result


def hit(bench: Bench, kind: str, process: subprocess.Popen, disk: Path, place: str, dice: random.Random, result: Strike) -> str:
    """Strike; what to say of it."""
    if kind == "worker":
        signs = sorted((disk / STAGE).glob("attempts/*/alive-*.json"))
        victim = json.loads(dice.choice(signs).read_text())
        os.kill(victim["pid"], signal.SIGKILL)
        return f"rank {victim['rank']}"
    if kind == "raylet":
        send([one for one in family(process) if one.name() == "raylet"], signal.SIGKILL)
        return ""
    if kind == "ghost":
        return ghost(bench, process, place, result)
    if kind == "driver":
        process.kill()
        return ""
    send(family(process), signal.SIGKILL)
    return "all processes"


def ghost(bench: Bench, process: subprocess.Popen, place: str, result: Strike) -> str:
    """Freeze everything, let another machine finish, wake it up: it must end and leave everything as it is."""
    frozen = family(process)
    send(frozen, signal.SIGSTOP)
    try:
        other = f"chaos-{result.number}-other"
        while (status := finish(bench.start(place, other))) != 0:  # refused until the frozen one's lease has run out
            result.commands += 1
            if result.commands > 60:
                raise TimeoutError(f"the other machine could not take over: exit status {status}")
            time.sleep(3)
        before = everything(place)
    finally:
        send(frozen, signal.SIGCONT)
    status = finish(process)
    after = everything(place)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if status == 0 or changed:
        raise AssertionError(f"the ghost ended with {status} and changed {changed}")
    return f"woke up after the end, left with {status}, changed nothing"


def finish(process: subprocess.Popen) -> int:
    try:
        return process.wait(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        send(family(process), signal.SIGKILL)
        return process.wait()


def carry_on(bench: Bench, process: subprocess.Popen, place: str, result: Strike) -> None:
    """Let it go on; where the command itself was struck, repeat it. On S3 every repetition is on a new machine."""
    status = finish(process)
    result.commands += 1
    if result.kind == "ghost":
        return
    number, deadline = 0, time.monotonic() + PATIENCE_S
    while status != 0 and time.monotonic() < deadline:
        number += 1
        time.sleep(3)  # on another machine it is refused until the lease of the one that was struck has run out
        status = finish(bench.start(place, f"chaos-{result.number}-{number}" if place.startswith("s3://") else f"chaos-{result.number}-0"))
        result.commands += 1


def journal(place: str) -> list[dict]:
    found = read_versioned(f"{place}/journal.jsonl") if place.startswith("s3://") else (Path(place, "journal.jsonl").read_bytes(), "")
    return [json.loads(line) for line in found[0].splitlines()] if found else []


# ---------------------------------------------------------------- report

SECTION = "## Chaos"
TEXT = f"""{SECTION}

`python tests/chaos/chaos.py --runs 20 --record chaos.json --write docs/reliability.md`.
{__doc__.split(chr(10) + chr(10))[1]}
"Step" is the newest metrics line when it struck, "attempts" the attempts that the journal counts, "commands" how often the command was
started (on another machine it is refused until the lost controller's lease has run out, 60 s, and asks again every three seconds).
"""


def table(strikes: list[Strike]) -> str:
    rows = ["| run | struck | storage | step | attempts | commands | seconds | same weights | |", "|" + "---|" * 9]
    rows += [f"| {s.number} | {s.kind} | {s.storage} | {s.step} | {s.attempts} | {s.commands} | {s.seconds:.0f} | "
             f"{'yes' if s.equal else '**no**'} | {s.note} |" for s in strikes]  # fmt: skip
    return "\n".join(rows)


def write_section(path: Path, section: str, text: str, rows: str) -> None:
    """Replace a section of a page, or append it."""
    before = path.read_text(encoding="utf-8") if path.exists() else "# Reliability\n"
    head, _, rest = before.partition(section + "\n")
    after = rest.partition("\n## ")[2]
    path.write_text(f"{head.rstrip()}\n\n{text}\n{rows}\n" + (f"\n## {after}" if after else ""), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first run; the number decides what is struck")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for recipe, corpus and runs; default: a temporary one")
    parser.add_argument("--record", type=Path, help="results so far (JSON), read and written")
    parser.add_argument("--write", type=Path, help="put the table into this file's section 'Chaos'")
    options = parser.parse_args()
    known = json.loads(options.record.read_text()) if options.record and options.record.exists() else {"expected": None, "strikes": []}
    strikes = {entry["number"]: Strike(**entry) for entry in known["strikes"]}
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="terrace-chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        server = stack.enter_context(s3_server.serve_s3())
        os.environ.update({**s3_server.ACCESS, "AWS_ENDPOINT_URL": server.url})
        s3().mkdir(BUCKET)
        bench = Bench(folder, server)
        bench.prepare()
        if known["expected"] is None:
            if finish(bench.start(str(folder / "undisturbed"), "chaos-undisturbed")) != 0:
                raise SystemExit(f"the undisturbed run failed; see {folder}/log.txt")
            known["expected"] = outcome(str(folder / "undisturbed"))
        for number in range(options.first, options.first + options.runs):
            done = strike(bench, number, options.seed, known["expected"])
            strikes[number] = done
            print(table([done]).splitlines()[-1], flush=True)
            if options.record:
                known["strikes"] = [asdict(strikes[key]) for key in sorted(strikes)]
                options.record.write_text(json.dumps(known, indent=1))
    ordered = [strikes[key] for key in sorted(strikes)]
    if options.write:
        write_section(options.write, SECTION, TEXT, table(ordered))
    return 0 if all(one.equal for one in ordered) else 1


if __name__ == "__main__":
    sys.exit(main())
