"""Credentials inside URIs: found, and taken out of what is shown."""

from __future__ import annotations

import re

_URI = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.\-]*)://(?P<rest>\S*)")
_PORT = re.compile(r"\d+(?:[/?#]|$)")
_SECRET_WORDS = re.compile(
    r"[?&](?:[\w.\-]*(?:password|passwd|secret|token|signature|credential)[\w.\-]*|api_?key|sig)=[^&#\s]", re.IGNORECASE
)
_TOKENS_ALONE = ("http", "https", "s3", "gs", "gcs", "abfs", "az", "hf")  # a name before @ is a token there; of a database it is a user
_INSTEAD = (
    "a recipe is copied to the run directory, the tracking server and reports. Give credentials by the environment instead: "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE for S3, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or "
    "MLFLOW_TRACKING_TOKEN for MLflow, PGPASSFILE for PostgreSQL"
)


def credentials_problem(text: str) -> str | None:
    """What is wrong with a text that has a URI with credentials in it, in words that do not repeat them; None for any other text."""
    for uri in _URI.finditer(text):
        if _has_credentials(uri["scheme"].lower(), uri["rest"]):
            return f"has credentials in its {uri['scheme'].lower()}:// URI, which would be copied along: {_INSTEAD}"
    return None


def redacted(text: str) -> str:
    """The text without what follows the scheme of a URI with credentials, for messages that quote what was given."""
    return _URI.sub(lambda uri: f"{uri['scheme']}://***" if _has_credentials(uri["scheme"].lower(), uri["rest"]) else uri[0], text)


def _has_credentials(scheme: str, rest: str) -> bool:
    if _SECRET_WORDS.search(rest):
        return True
    before, at, _ = rest.partition("@")
    if not at or rest.startswith("/"):  # no host, so nobody's name: sqlite:////data/a@b.db
        return False
    name, colon, password = before.partition(":")
    if "/" in name or not (name or colon):  # the @ stands in a path: s3://bucket/a@b
        return False
    if colon:  # a secret may have slashes of its own (AWS's do); a port has digits only
        return not _PORT.match(password + "/") or "/" not in password
    return scheme in _TOKENS_ALONE
