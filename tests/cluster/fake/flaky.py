"""The store as an operator reaches it over a bad line: some calls fail before they act, some after."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from fake.store import Store
from terrace.cluster.api import ApiError, Refused

API_ERROR, REFUSED = 0.004, 0.01


class Flaky:
    """Counts the calls; `refused` counts refusals of RayJobs by Curriculum."""

    namespace = "default"

    def __init__(self, store: Store, numbers: random.Random, counts: Counter[str], refused: Counter[str]) -> None:
        self._store, self._numbers, self._counts, self._refused = store, numbers, counts, refused

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        def flaky(*args: Any, **kwargs: Any) -> Any:
            kind = args[0]["kind"] if isinstance(args[0], dict) else args[0]
            self._counts[f"{name} {kind}"] += 1
            dice = self._numbers.random()
            if dice < API_ERROR / 2:
                raise ApiError("the API server is away", 503)
            if name == "create" and kind == "RayJob" and self._numbers.random() < REFUSED:
                self._refused[args[0]["metadata"]["name"].rsplit("-s", 1)[0]] += 1
                raise Refused("webhook: try again later", 403)
            result = call(*args, **kwargs)
            if dice > 1 - API_ERROR / 2:
                raise ApiError("the answer was lost", 504)
            return result

        return flaky
