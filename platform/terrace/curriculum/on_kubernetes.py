"""The same commands for a run on Kubernetes, named `k8s://NAMESPACE/NAME`: the operator runs it, these pass wishes on and look."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.recipe.schema import Recipe


def is_reference(run: str) -> bool:
    return run.startswith("k8s:/")


def run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Create or update the Curriculum, then follow it to its end. Leaving with Ctrl-C leaves the run going."""
    from terrace.cluster import kubernetes

    if arguments.cluster is None:
        raise InputError("--launcher kubernetes needs --cluster FILE: runtime image, storage, queue (see `terrace render --help`)")
    reference = kubernetes.launch(recipe, Path(arguments.cluster), arguments.name, arguments.namespace)
    if arguments.from_stage:
        kubernetes.request(reference, "resume", arguments.from_stage)
    print(f"{reference} follows; Ctrl-C leaves it running", file=sys.stderr)
    return kubernetes.follow(reference)


def wish(run_name: str, word: str, stage: str | None = None) -> int:
    """pause, suspend, cancel, resume."""
    from terrace.cluster import kubernetes

    reference = reference_of(run_name)
    kubernetes.request(reference, word, stage)
    print(f"{reference}: {word} asked of the operator; `terrace status {reference}` shows when it is done")
    return 0


def status(run_name: str, as_json: bool) -> int:
    from terrace.cluster import kubernetes

    reference = reference_of(run_name)
    found = kubernetes.read_status(reference)
    print(json.dumps(found, indent=2) if as_json else f"{reference}  {kubernetes.describe(found)}")
    return 0


def logs(run_name: str, stage: str | None = None, rank: int = 0, follow: bool = False) -> int:
    """What the submitter pods of a stage, or of all, have printed: the driver's lines, with those of its workers."""
    from terrace.cluster import kubernetes

    reference = reference_of(run_name)
    if rank:
        raise InputError(f"--rank {rank}: pods have the driver's log only; a rank's own lies in the run directory (`terrace logs DIR`)")
    for line in kubernetes.pod_logs(reference, stage, follow):
        print(line, flush=follow)
    return 0


def reference_of(run_name: str) -> Any:
    from terrace.cluster.kubernetes import parse_reference

    reference = parse_reference(run_name)
    if reference is None:
        raise InputError(f"{run_name}: a run on Kubernetes is named k8s://NAMESPACE/NAME")
    return reference
