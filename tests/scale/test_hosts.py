"""Eight hosts of two ranks each train on S3, lose every process and every disk, and end with what two ranks come to undisturbed.

Each rank is two processes, one that obeys the first rank and one that trains. TERRACE_SCALE_RANKS=4 has four on each host, where 17 GB
are free.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent, HERE.parent / "e2e"):
    sys.path.insert(0, str(folder))

from e2e_runs import SOURCES  # noqa: E402
from hosts import Hosts, available_gigabytes, base_environment, rows  # noqa: E402
from safetensors.numpy import load  # noqa: E402
from stored_run import BUCKET, machines_and_bucket  # noqa: E402

from terrace.storage.conditional import list_objects, read_versioned  # noqa: E402

STAGE, STEPS = "stages/01-projector-warmup", 6
HOSTS, RANKS = 8, int(os.environ.get("TERRACE_SCALE_RANKS", "2"))
GIGABYTES = 1.0 + 0.5 * HOSTS * RANKS  # 0.46 of a rank's two processes are its own
PATIENCE_S = 1500.0  # 32 processes start on whatever cores there are


def recipe(folder: Path, workers: int) -> Path:
    """The tiny recipe's first stage under FSDP, as many packs a step as the hosts have ranks, a checkpoint every two steps."""
    from terrace.demo.corpus import write_corpus

    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus, seed=1, samples={"captions": 60}, workers=1)
    values = yaml.safe_load((HERE.parent / "recipes" / "tiny.yaml").read_text())
    values["data"]["sources"] = {"captions": {**values["data"]["sources"]["captions"], "uri": str(corpus / f"{SOURCES['captions']}.jsonl")}}
    values["stages"] = [values["stages"][0] | {
        "budget": {"steps": STEPS}, "batch": {"packs": HOSTS * RANKS}, "resources": {"workers": workers},
        "data_loading": {"engine": "inline"}, "parallel": {"strategy": "fsdp"}, "checkpoint": {"every_steps": 2},
        "failure": {"backoff_seconds": 0.5, "stall_timeout_seconds": 1500, "hang_timeout_seconds": 1400},
    }]  # fmt: skip
    path = folder / f"recipe-{workers}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def complete(place: str) -> dict:
    """The checkpoints that count."""
    fence = read_versioned(f"{place}/{STAGE}/checkpoints/attempt.json")
    return json.loads(fence[0])["complete"] if fence else {}


def weights(place: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    if place.startswith("s3://"):
        names = [entry.name for entry in list_objects(f"{place}/{STAGE}/final") if entry.name.endswith(".safetensors")]
        contents = [read_versioned(f"{place}/{STAGE}/final/{name}")[0] for name in names]
    else:
        contents = [path.read_bytes() for path in Path(place, STAGE, "final").glob("*.safetensors")]
    for content in contents:
        found |= load(content)
    return found


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.skipif(available_gigabytes() < GIGABYTES, reason=f"{HOSTS * RANKS} ranks take {GIGABYTES:.0f} GB")
def test_eight_hosts_are_lost_and_resume(tmp_path: Path) -> None:
    with machines_and_bucket(tmp_path) as machines:
        environment = base_environment() | machines.environment("unused")
        alone = Hosts(tmp_path / "alone", 1, 2, environment)
        hosts = Hosts(tmp_path / "hosts", HOSTS, RANKS, environment)
        for some in (alone, hosts):
            some.folder.mkdir()
        try:
            alone.start("run", str(recipe(tmp_path, 2)), "--run-dir", str(tmp_path / "reference"))
            alone.finish(PATIENCE_S)
            reference = rows(tmp_path / "reference" / STAGE)
            place = f"s3://{BUCKET}/hosts"
            command = ["run", str(recipe(tmp_path, HOSTS * RANKS)), "--run-dir", place]
            hosts.start(*command)
            hosts.wait_until(lambda: complete(place), PATIENCE_S)  # its successor waits for it, so steps are left
            hosts.lose()
            hosts.start(*command)
            hosts.finish(PATIENCE_S)
        finally:
            alone.lose()
            hosts.lose()
        events = [json.loads(line) for line in read_versioned(f"{place}/journal.jsonl")[0].splitlines()]
        assert sum(event["event"] == "stage_attempt_started" for event in events) == 2
        found = [json.loads(line) for line in read_versioned(f"{place}/{STAGE}/metrics.jsonl")[0].splitlines()]
        assert [row["step"] for row in found] == list(range(1, STEPS + 1)), "every step once"
        for ours, theirs in zip(found, reference, strict=True):
            assert (ours["tokens"], ours["samples"]) == (theirs["tokens"], theirs["samples"])
            np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        ours, theirs = weights(place), weights(str(tmp_path / "reference"))
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            assert float(np.abs(ours[name] - values).max()) < 5e-5, name
