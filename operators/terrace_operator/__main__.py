"""`python -m terrace_operator --namespace N`: the operator, inside a cluster or outside with a kubeconfig."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from datetime import UTC, datetime

import kopf

from terrace.cluster.api import Api
from terrace.cluster.credentials import connect
from terrace.errors import TerraceError
from terrace_operator.cache import CHILD_KINDS
from terrace_operator.controller import Controller
from terrace_operator.handlers import register
from terrace_operator.leader import Leader
from terrace_operator.metrics import Metrics
from terrace_operator.runtime import Runtime, serve_health

WATCHED = ("Curriculum", *CHILD_KINDS)


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with the Curriculum's name where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": record.levelname.lower(),
                "logger": record.name, "message": record.getMessage()}  # fmt: skip
        line |= {key: getattr(record, key) for key in ("curriculum", "reason") if hasattr(record, key)}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("terrace_operator", description=__doc__)
    parser.add_argument("--namespace", "-n", default=os.environ.get("TERRACE_NAMESPACE"), help="namespace to act in")
    parser.add_argument("--port", type=int, default=8080, help="port of /healthz, /readyz and /metrics; 0: a free one")
    parser.add_argument("--workers", type=int, default=4, help="curricula handled at the same time")
    parser.add_argument("--lease-seconds", type=float, default=15.0, help="a replica that is silent this long is replaced")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=options.log_level, handlers=[handler], force=True)
    metrics = Metrics()
    try:
        api = connect(options.namespace, metrics.on_call)
    except TerraceError as error:
        print(f"terrace_operator: {error}", file=sys.stderr)
        return error.exit_status
    controller = Controller(api, metrics=metrics)
    metrics.show(lambda: [controller.cache.curriculum(name) or {"metadata": {}} for name in controller.cache.names()])
    leader = Leader(api, f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}", options.lease_seconds)
    runtime = Runtime(controller, leader, metrics, options.workers)
    server = serve_health(runtime, options.port)
    logging.getLogger("terrace.operator").info("operator starts in namespace %s, port %s", api.namespace, server.server_port)
    stop = threading.Event()

    def end(*_: object) -> None:
        stop.set()
        runtime.renew.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    runtime.start()
    try:
        # kopf's own signal handlers are off outside the main thread; the flag stops it, and the workers end after it.
        watching = threading.Thread(target=_watch, args=(runtime, api, stop), daemon=True)
        watching.start()
        while watching.is_alive() and not stop.wait(0.5):
            pass
        watching.join(timeout=10)
    finally:
        runtime.stop()
        server.shutdown()
    if not stop.is_set():
        logging.getLogger("terrace.operator").error("the watches ended; leaving so that the pod is restarted")
        return 1
    return 0


def _watch(runtime: Runtime, api: Api, stop: threading.Event) -> None:
    """kopf's watches until `stop`; begun anew when a kind that was absent has come, as kopf looks for kinds only at its start."""
    while not stop.is_set():
        runtime.renew.clear()
        registry = kopf.OperatorRegistry()
        register(registry, runtime, frozenset(kind for kind in WATCHED if not api.knows(kind)))
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.run_until_complete(
            kopf.operator(registry=registry, namespaces=[api.namespace], standalone=True, clusterwide=False, stop_flag=runtime.renew)
        )
        loop.close()
        if not runtime.renew.is_set():
            return  # the watches ended by themselves


if __name__ == "__main__":
    sys.exit(main())
