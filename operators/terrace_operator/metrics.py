"""Prometheus metrics of the operator. `NoMetrics` stands in where nobody scrapes (tests, simulation)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from terrace_operator.gauges import HELP, samples
from terrace_operator.reconcile import Create, Plan


class NoMetrics:
    def planned(self, plan: Plan) -> None:
        pass

    def conflict(self) -> None:
        pass


class Metrics:
    """Counters on their own registry, so that several can live in one process."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self.reconcile_seconds = Histogram("terrace_reconcile_seconds", "Time of one reconcile with its API calls.", registry=self.registry)
        self.errors = Counter("terrace_reconcile_errors_total", "Reconciles that ended in an error.", registry=self.registry)
        self.conflicts = Counter("terrace_status_conflicts_total", "Status writes refused as stale.", registry=self.registry)
        self.api_calls = Counter("terrace_api_calls_total", "Calls to the API server.", ["method", "kind", "code"], registry=self.registry)
        self.happened = Counter("terrace_events_total", "What happened to curricula.", ["reason"], registry=self.registry)
        self.created = Counter("terrace_rayjobs_created_total", "Stage attempts created.", registry=self.registry)
        self.curricula = Gauge("terrace_curricula", "Curricula by phase.", ["phase"], registry=self.registry)
        self.queue = Gauge("terrace_queue_length", "Curricula waiting for a reconcile.", registry=self.registry)
        self.leader = Gauge("terrace_leader", "1 where this replica acts.", registry=self.registry)

    def show(self, curricula: Callable[[], list[dict[str, Any]]]) -> None:
        """Let every scrape read the gauges of these curricula."""
        self.registry.register(_Gauges(curricula))

    def planned(self, plan: Plan) -> None:
        for event in plan.events:
            self.happened.labels(event.reason).inc()
        self.created.inc(sum(isinstance(effect, Create) and effect.body["kind"] == "RayJob" for effect in plan.effects))

    def conflict(self) -> None:
        self.conflicts.inc()

    def on_call(self, method: str, kind: str, code: int) -> None:
        self.api_calls.labels(method, kind, str(code)).inc()

    def count_phases(self, curricula: list[dict[str, Any]]) -> None:
        counts: dict[str, int] = dict.fromkeys(
            ("Pending", "Queued", "Running", "Restarting", "Paused", "Suspended", "Succeeded", "Failed"), 0
        )
        for curriculum in curricula:
            phase = (curriculum.get("status") or {}).get("phase", "Pending")
            counts[phase] = counts.get(phase, 0) + 1
        for phase, number in counts.items():
            self.curricula.labels(phase).set(number)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


@dataclass(eq=False)
class _Gauges:
    """A collector in prometheus_client's sense."""

    curricula: Callable[[], list[dict[str, Any]]]

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        families: dict[str, Any] = {}
        for name, labels, value in samples(self.curricula(), time.time()):
            family = families.setdefault(name, GaugeMetricFamily(name, HELP[name], labels=list(labels)))
            family.add_metric(list(labels.values()), value)
        yield from families.values()

    def describe(self) -> list[Any]:
        return []
