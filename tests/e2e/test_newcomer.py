"""A newcomer with a checkpoint and rows: the commands of the README and of the pages, and nothing else, up to a conversation."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from newcomer_world import QUESTION, TEMPLATE_MARK, write_checkpoint, write_rows

from terrace.demo.along import Clock

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """A `terrace` that was installed from the wheel, without the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("platform", "operators", "jobs", "k8s"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "build"))
    for file in REPOSITORY.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([*pip, str(source)], check=True, timeout=300)
    shutil.rmtree(source)
    program = folder / "bin" / "terrace"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; from terrace.cli import main; sys.exit(main())' \"$@\"\n")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder / "site"), "DS_ACCELERATOR": "cpu", "HOME": str(folder)}


def commands(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    if page == "README.md":
        text = text.split("## From your checkpoint to a conversation")[1].split("\n## ")[0]
    return [line.partition("   #")[0] for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def run(command: str, folder: Path, environment: dict[str, str], **more) -> subprocess.CompletedProcess[str]:
    given = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 900, **more}
    done = subprocess.run(shlex.split(command), check=False, **given)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.fixture
def world(tmp_path) -> Path:
    write_rows(tmp_path / "data")
    write_checkpoint(tmp_path / "checkpoints" / "mine")
    return tmp_path


def test_the_readme_leads_to_a_conversation(world, environment, record_property):
    init, train, chat, serve = commands("README.md")
    for old, new in (("path/to/checkpoint", "checkpoints/mine"), ("path/to/rows", "data"), ("path/to/picture.png", "data/pictures/0.png")):
        init, chat = init.replace(old, new), chat.replace(old, new)
    question = QUESTION.removeprefix("<image>")
    with Clock() as clock:
        before = clock.cpu_seconds
        run(init, world, environment)
        run(train, world, environment)
        said = run(chat, world, environment, input=f"{question}\n").stdout.strip()
        took = {"seconds": round(clock.seconds), "cpu_seconds": round(clock.cpu_seconds - before)}
    colours = json.loads((world / "data" / "colours.json").read_text())
    assert said == colours[0]["conversations"][1]["value"]
    for name, value in took.items():  # written down, not held to: the machine may have other work
        record_property(name, value)
    print(f"from the checkpoint to the first answer: {took['seconds']} s on the clock, {took['cpu_seconds']} s of CPU in all processes")

    final = world / "mine" / "run" / "stages" / "01-sft" / "final"
    assert (final / "chat_template.jinja").read_text().startswith(TEMPLATE_MARK)
    assert json.loads((final / "generation_config.json").read_text())["temperature"] == 0.7
    with subprocess.Popen([*shlex.split(serve), "--port", "0"], cwd=world, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = re.search(r"http://\S+", server.stdout.readline())[0]
            body = json.dumps({"model": "run", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4}).encode()
            request = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as response:
                assert json.load(response)["choices"][0]["message"]["role"] == "assistant"
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0


@pytest.mark.parametrize("page", ["docs/from-llama-factory.md", "docs/from-ms-swift.md"])
def test_the_commands_of_a_page_lead_to_a_conversation(page, world, environment):
    told = [run(command, world, environment).stdout for command in commands(page)]
    assert any(re.fullmatch(r"It is \w+\.\n", text) for text in told)
