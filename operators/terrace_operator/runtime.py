"""Threads around the controller: workers, periodic resync, leader lease, health and metrics. Nothing here decides anything."""

from __future__ import annotations

import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from terrace.cluster.api import ApiError
from terrace_operator.controller import Controller
from terrace_operator.leader import Leader
from terrace_operator.metrics import Metrics
from terrace_operator.queue import WorkQueue

Manifest = dict[str, Any]
logger = logging.getLogger("terrace.operator")
RESYNC_SECONDS = 300.0
ERROR_SECONDS = 5.0
ABSENT_SECONDS = 15.0  # between looks for a kind that the cluster does not know yet


class Runtime:
    """Runs one controller. `seen` is called by the watches, from any thread."""

    def __init__(self, controller: Controller, leader: Leader, metrics: Metrics, workers: int = 4) -> None:
        self.controller, self.leader, self.metrics = controller, leader, metrics
        self._queue = WorkQueue()
        self._stop = threading.Event()
        self._synced = threading.Event()
        self.renew = threading.Event()  # the watches are to begin anew: a kind that was absent has come, or all ends
        self._beats = {number: time.monotonic() for number in range(workers)}
        self._threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(workers)]
        self._threads.append(threading.Thread(target=self._resync, daemon=True))
        self._threads.append(threading.Thread(target=leader.run, daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let every worker finish what it does, then give the lease back."""
        self._stop.set()
        self._queue.close()
        for thread in self._threads[:-2]:
            thread.join(timeout=10)
        self.leader.stop()

    def seen(self, kind: str, body: Manifest, deleted: bool) -> None:
        """A watch showed an object: remember it and wake its Curriculum, unless it is what this process has just written."""
        if kind == "Curriculum" and not deleted and self.controller.cache.knows(body):
            return
        if name := self.controller.cache.store(kind, body, deleted=deleted):
            self._queue.add(name)

    @property
    def healthy(self) -> bool:
        """False when a worker has hung for a minute: the kubelet restarts the pod."""
        return all(time.monotonic() - beat < 60.0 for beat in self._beats.values())

    @property
    def ready(self) -> bool:
        return self._synced.is_set()

    def _resync(self) -> None:
        """The first list before anything is decided; later ones repair what a watch lost, or follow a kind that has come."""
        wait, due = 0.0, time.monotonic()
        while not self._stop.wait(wait):
            try:
                come = self.controller.look_for_absent()
                if come or time.monotonic() >= due:
                    self._list_all()
                    due = time.monotonic() + RESYNC_SECONDS
                if come:
                    logger.info("the cluster knows %s now", ", ".join(come))
                    self.renew.set()
                wait = ABSENT_SECONDS if self.controller.cache.absent else max(due - time.monotonic(), 0.0)
            except ApiError as error:
                logger.warning("resync failed: %s", error)
                wait = ERROR_SECONDS

    def _list_all(self) -> None:
        for name in self.controller.resync():
            self._queue.add(name)
        if "Curriculum" in self.controller.cache.absent:
            logger.error("the cluster does not know the kind Curriculum: kubectl apply -k k8s/crds installs it")
            return
        self._synced.set()
        self.metrics.count_phases([self.controller.cache.curriculum(name) or {} for name in self.controller.cache.names()])

    def _work(self, number: int) -> None:
        while not self._stop.is_set():
            self._beats[number] = time.monotonic()
            self.metrics.queue.set(len(self._queue))
            self.metrics.leader.set(self.leader.is_leader)
            if not (self._synced.is_set() and self.leader.is_leader):
                time.sleep(0.1)
                continue
            name = self._queue.take(timeout=1.0)
            if name is None:
                continue
            try:
                with self.metrics.reconcile_seconds.time():
                    again = self.controller.handle(name)
            except ApiError as error:
                self.metrics.errors.inc()
                logger.warning("reconcile: %s", error, extra={"curriculum": name})
                again = ERROR_SECONDS
            except Exception:
                # A defect in one Curriculum's handling must not stop the others; it is counted, shown and tried again.
                self.metrics.errors.inc()
                logger.exception("reconcile failed", extra={"curriculum": name})
                again = ERROR_SECONDS
            finally:
                self._queue.done(name)
            if again is not None:
                self._queue.look_again(name, again)


def serve_health(runtime: Runtime, port: int) -> ThreadingHTTPServer:
    """/healthz, /readyz and /metrics on one port, in a thread. Port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers = {"/healthz": runtime.healthy, "/readyz": runtime.ready, "/metrics": True}
            good = answers.get(self.path)
            body = runtime.metrics.text() if self.path == "/metrics" else (b"ok\n" if good else b"no\n")
            self.send_response(404 if good is None else 200 if good else 503)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Probes every few seconds are no news."""

    server = ThreadingHTTPServer(("", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
