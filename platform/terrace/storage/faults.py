"""What a storage's error means: passing by itself, refused until somebody changes something, or neither.

Looked for in the error and in everything that caused it, since s3fs turns the service's answers into errors of the operating system.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from terrace.errors import TerraceError

_PASSING_CODES = {
    "InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestTimeTooSkewed",
    "RequestLimitExceeded", "BandwidthLimitExceeded", "ConditionalRequestConflict", "OperationAborted", "500", "502", "503", "504", "429",
}  # fmt: skip
_PASSING_TYPES = {
    "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "ClientPayloadError",
    "ServerDisconnectedError", "ClientConnectorError", "ClientOSError", "ResponseStreamingError", "IncompleteReadError",
    "HTTPClientError", "FSTimeoutError", "ContentLengthError",
}  # fmt: skip
_PASSING_NUMBERS = (5, 16, 104, 110, 111)  # EIO and EBUSY are s3fs's words for 5xx; connection reset, timed out, refused
_DENIED_CODES = {
    "AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden", "403",
    "ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidSecurity", "RequestExpired",
    "400",  # the whole answer of a HEAD under an expired token
}  # fmt: skip
_NO_CREDENTIALS_TYPES = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "TokenRetrievalError",
    "UnauthorizedSSOTokenError", "SSOTokenLoadError",
}  # fmt: skip


class StorageError(TerraceError):
    """An object could not be read or written after every allowed try."""


def is_passing(error: BaseException | None) -> bool:
    """Whether trying again may help: 5xx, throttling, timeouts, broken connections, in the error or in what caused it."""
    return any(
        _code(cause) in _PASSING_CODES
        or _status(cause) >= 500
        or _status(cause) == 429
        or isinstance(cause, (TimeoutError, ConnectionError))
        or bool(_types(cause) & _PASSING_TYPES)
        or (isinstance(cause, OSError) and cause.errno in _PASSING_NUMBERS)
        for cause in _chain(error)
    )


def refusal(error: BaseException, uri: str, endpoint: str | None) -> str | None:
    """Why the storage will not have this request, in words with what to do; None for an error of another kind."""
    for cause in _chain(error):
        if _types(cause) & _NO_CREDENTIALS_TYPES:
            return (
                f"no credentials for S3 ({cause}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give"
                " this machine a role"
            )
        if _code(cause) == "NoSuchBucket":
            bucket = uri.removeprefix("s3://").partition("/")[0]
            return f"there is no bucket {bucket!r} at {endpoint or _endpoint()}; check name and endpoint, or make it first"
        if isinstance(cause, PermissionError) or _code(cause) in _DENIED_CODES:
            return f"access denied ({cause}); check the credentials and the bucket's policy"
    return None


def condition_refused(error: BaseException) -> bool:
    """Whether S3 refused a write's condition. (409, two writes that met, is tried again.)"""
    return any(_code(cause) in ("PreconditionFailed", "NoSuchKey", "412") for cause in _chain(error))


def is_no_bucket(error: BaseException) -> bool:
    """A missing bucket is a FileNotFoundError like a missing object, and means something else: not "there is none yet"."""
    return any(_code(cause) == "NoSuchBucket" for cause in _chain(error))


def not_implemented(error: BaseException) -> bool:
    """Whether the service says that it does not know a header or a call."""
    return any(_code(cause) in ("NotImplemented", "501") or _status(cause) == 501 for cause in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _types(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0) if isinstance(response, dict) else 0


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS (no AWS_ENDPOINT_URL)"
