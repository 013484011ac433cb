"""One acting replica at a time, by a Lease, as every Kubernetes controller does it.

The lease is for order, not for safety: two replicas that both act do no harm (the status is written with its resourceVersion), they
only waste calls. So a short pause of the API server does not stop training. Time is measured by how long the lease has not
changed here, never by comparing clocks of two machines.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

from terrace.cluster.api import AlreadyExists, ApiError, Conflict
from terrace_operator.status import rfc3339

logger = logging.getLogger("terrace.leader")
NAME = "terrace-operator"
DURATION_SECONDS = 15.0


class Leader:
    """Takes the lease when it is free or has not changed for its duration; `is_leader` says whether it is held."""

    def __init__(self, api: Any, identity: str, seconds: float = DURATION_SECONDS) -> None:
        self._api, self._identity, self._seconds = api, identity, seconds
        self._seen: tuple[str, float] = ("", time.monotonic())
        self._renewed = float("-inf")
        self._stop = threading.Event()

    @property
    def is_leader(self) -> bool:
        return time.monotonic() - self._renewed < self._seconds

    def run(self) -> None:
        """Renew until stopped (a thread of its own)."""
        while not self._stop.is_set():
            was = self.is_leader
            try:
                self.renew()
            except ApiError as error:
                logger.warning("lease not renewed: %s", error)
            if self.is_leader != was:
                logger.info("this replica %s", "acts now" if self.is_leader else "stands by")
            self._stop.wait(self._seconds / 4 if self.is_leader else min(1.0, self._seconds / 8))

    def stop(self) -> None:
        """Stop renewing and free the lease, so that the next replica need not wait."""
        self._stop.set()
        if not self.is_leader:
            return
        self._renewed = float("-inf")
        try:
            lease = self._api.get("Lease", NAME)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                self._api.replace({**lease, "spec": {**lease["spec"], "holderIdentity": ""}})
        except ApiError as error:
            logger.warning("lease not freed: %s", error)

    def renew(self) -> None:
        lease = self._api.get("Lease", NAME)
        spec = {"holderIdentity": self._identity, "leaseDurationSeconds": math.ceil(self._seconds),
                "renewTime": (rfc3339(time.time()) or "")[:-1] + ".000000Z"}  # fmt: skip
        started = time.monotonic()
        try:
            if lease is None:
                self._api.create({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec,
                                  "metadata": {"name": NAME, "namespace": self._api.namespace}})  # fmt: skip
            else:
                version = lease["metadata"]["resourceVersion"]
                if version != self._seen[0]:
                    self._seen = (version, started)
                holder = lease["spec"].get("holderIdentity")
                expired = started - self._seen[1] > lease["spec"].get("leaseDurationSeconds", self._seconds)
                if holder not in ("", None, self._identity) and not expired:
                    return
                self._api.replace({**lease, "spec": {**lease["spec"], **spec}})
        except (AlreadyExists, Conflict):
            return
        self._renewed = started
