"""What neither the API server nor a recipe's own rules can see: stages against the pods they get. Pure."""

from __future__ import annotations

from terrace.cluster.cluster_schema import CurriculumSpec
from terrace.cluster.manifests import worker_bounds


def cluster_problems(spec: CurriculumSpec) -> list[str]:
    """Everything wrong between recipe and cluster, each with its place and a way out."""
    problems = []
    per_pod = spec.runtime.workers_per_pod
    cpus_per_pod = cpus(spec.runtime.worker.cpu)
    for number, stage in enumerate(spec.recipe.stages):
        where = f"recipe.stages[{number}] ({stage.name})"
        gpus = stage.resources.gpus_per_worker * per_pod
        if gpus != int(gpus):
            problems.append(
                f"{where}: {per_pod} workers per pod at {stage.resources.gpus_per_worker:g} GPUs each need {gpus:g} GPUs in a "
                "pod, which is not whole: change runtime.workersPerPod"
            )
        needed = stage.resources.cpus_per_worker * per_pod
        if needed > cpus_per_pod:
            problems.append(f"{where}: {needed:g} CPUs of workers do not fit a pod of {spec.runtime.worker.cpu}: raise runtime.worker.cpu")
        low, high = worker_bounds(stage)
        if low % per_pod or high % per_pod:
            problems.append(f"{where}: {low} to {high} workers do not divide into pods of {per_pod}")
    return problems


def cpus(quantity: str) -> float:
    """A Kubernetes CPU quantity in cores."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
