"""A recipe and its rows travel as the working directory of a Ray job: a zip that the nodes fetch over HTTP and from S3."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import boto3
import pytest
import yaml
from ray_head import ray_head
from s3_server import ACCESS, serve_s3

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"


def zipped(folder: Path) -> Path:
    """A zip of one folder: a recipe with a source named relative to it."""
    recipe = yaml.safe_load(TINY.read_text())
    recipe["data"]["sources"] = {"mine": {"uri": "rows.jsonl", "kind": "caption"}}
    for stage in recipe["stages"]:
        stage["mixture"] = {"mine": 1.0}
    path = folder / "mine.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mine/recipe.yaml", yaml.safe_dump(recipe))
        archive.writestr("mine/rows.jsonl", json.dumps({"text": "one"}) + "\n")
    return path


def test_a_zip_is_fetched_over_http_and_from_s3(tmp_path: Path) -> None:
    archive = zipped(tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with serve_s3() as store:
        client = boto3.client("s3", endpoint_url=store.url, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1")
        client.create_bucket(Bucket="jobs")
        client.upload_file(str(archive), "jobs", "mine.zip")
        try:
            with ray_head(token=True, AWS_ENDPOINT_URL=store.url, **ACCESS) as head:
                for place in (f"http://127.0.0.1:{web.server_port}/mine.zip", "s3://jobs/mine.zip"):
                    ray = str(Path(sys.executable).with_name("ray"))
                    command = [ray, "job", "submit", "--address", head.address, "--working-dir", place, "--"]
                    command += [sys.executable, "-m", "terrace.cli", "validate", "recipe.yaml"]
                    done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=400, check=False)
                    assert done.returncode == 0, done.stdout + done.stderr
                    assert "tiny is valid: 4 stages" in done.stdout, done.stdout
        finally:
            web.shutdown()
            web.server_close()
