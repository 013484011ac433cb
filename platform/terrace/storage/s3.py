"""The S3 file system, one per process, and the tries every request gets.

5xx answers, throttling, timeouts and broken connections are tried again with exponential backoff and full jitter before they become a
StorageError that names the object. Credentials come through the usual AWS chain (environment, files, instance role), never through a
recipe.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from terrace.errors import InputError
from terrace.recipe.schema import Storage
from terrace.storage.faults import StorageError, is_passing, refusal

PARALLEL_REQUESTS = 8
BACKOFF_BASE_SECONDS = 0.2
BACKOFF_CAP_SECONDS = 20.0
OPEN_ANEW_SECONDS = 5.0
TELL_AT_ATTEMPT = 3  # the first two cost half a second; from here on somebody may wonder
DEFAULT_STORAGE = Storage()
Result = TypeVar("Result")
log = logging.getLogger(__name__)
_opened = 0.0  # when file systems were last dropped, by the monotonic clock
_served: set[tuple[Any, ...]] = set()  # process, endpoint, bucket, first folder, whether it was a write: what was allowed once


@lru_cache(maxsize=8)
def _filesystem(storage_json: str, process: int) -> Any:
    from terrace.storage.bounded import BoundedS3

    storage = Storage.model_validate_json(storage_json)
    client: dict[str, Any] = {"region_name": storage.region} if storage.region else {}
    return BoundedS3(
        timeout_seconds=storage.timeout_seconds,
        endpoint_url=storage.endpoint_url,
        client_kwargs=client,
        # Our own loop retries (with jitter, and a message that names the object): the layers below try once.
        config_kwargs={
            "retries": {"total_max_attempts": 1},
            "connect_timeout": min(storage.timeout_seconds, 20),
            "read_timeout": storage.timeout_seconds,
            "max_pool_connections": 4 * PARALLEL_REQUESTS,
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def s3(storage: Storage = DEFAULT_STORAGE) -> Any:
    """The s3fs file system of these settings, one per process (its event loop does not survive a fork)."""
    filesystem = _filesystem(storage.model_dump_json(), os.getpid())
    filesystem.retries = 1
    return filesystem


def _open_anew() -> None:
    """Have the chain of credentials asked again, at most every few seconds: a client takes a quarter of a second to make."""
    global _opened
    if time.monotonic() >= _opened + OPEN_ANEW_SECONDS:
        _filesystem.cache_clear()
        _opened = time.monotonic()


def _place(uri: str, storage: Storage, writes: bool) -> tuple[Any, ...]:
    return (os.getpid(), storage.endpoint_url, *uri.removeprefix("s3://").split("/")[:2], writes)


def admitted(uri: str, storage: Storage = DEFAULT_STORAGE) -> None:
    """This process comes after another one that has read and written there, so a refusal is a fault that passes, not a mistake."""
    _served.update(_place(uri, storage, writes) for writes in (False, True))


def retried(action: Callable[[], Result], uri: str, storage: Storage = DEFAULT_STORAGE, writes: bool = False) -> Result:
    """Run `action`, again while the storage has a passing fault, at most `storage.max_attempts` times.

    A refusal (no credentials, access denied, no such bucket) is the user's mistake and said at once, except where the same place has
    served this process before, or one that it comes after (`admitted`): then a token has run out or a gateway starts, and each try reads
    the credentials anew. `action` must therefore ask `s3` for its file system itself. Raises InputError, StorageError,
    FileNotFoundError.
    """
    place = _place(uri, storage, writes)
    for attempt in range(1, storage.max_attempts + 1):
        try:
            result = action()
        except Exception as error:
            refused = refusal(error, uri, storage.endpoint_url)
            if refused is None and isinstance(error, FileNotFoundError):
                raise
            if refused is not None and place not in _served:
                raise InputError(f"{uri}: {refused}") from error
            if refused is None and not is_passing(error):
                raise StorageError(f"{uri}: {type(error).__name__}: {error}") from error
            why = refused or f"{type(error).__name__}: {error}"
            if attempt == storage.max_attempts:
                raise StorageError(
                    f"{uri}: still failing after {attempt} tries ({why}); check the storage, then run the same command again"
                ) from error
            if refused is not None:
                _open_anew()
            if attempt == TELL_AT_ATTEMPT:
                log.warning("%s: tried %d times, going on up to %d (%s)", uri, attempt, storage.max_attempts, why)
            ceiling = min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2 ** (attempt - 1))
            time.sleep(ceiling / 2 + random.uniform(0, ceiling / 2))
        else:
            _served.add(place)
            return result
    raise AssertionError("max_attempts is at least 1")
