"""What Ray starts in place of Python where a fork server stands by: asks it for the worker, and lives and ends with it.

    python -I -S fork_client.py SOCKET PYTHON WORKER.py ARGUMENTS...

A file of its own without imports of Terrace or of packages: it runs once per worker process, and takes some 20 ms. Whatever else Ray asks
Python for, a worker of another environment than variables, or one that the server cannot make, becomes the process that Ray wanted.
"""

import json
import os
import socket
import sys

WORKER, SETUP = "default_worker.py", "setup_worker.py"  # of Ray; everything else is started as it is
ENVIRONMENT, LANGUAGE = "--serialized-runtime-env-context=", "--language=PYTHON"  # what the second takes out before it becomes the first
ANSWER_SECONDS = 45.0  # the server may still be importing; Ray gives a worker 60 to appear


def main() -> None:
    path, python, *words = sys.argv[1:]
    worker, variables = as_worker(words, python)
    if worker:
        made(path, worker, {**os.environ, **variables})
    os.execv(python, [python, *words])


def as_worker(words: list[str], python: str) -> tuple[list[str], dict[str, str]]:
    """The worker's script and arguments, and the variables of its environment; nothing where it is something else, or wants more."""
    if not words or os.path.basename(words[0]) != SETUP:
        return (words if words and os.path.basename(words[0]) == WORKER else []), {}
    rest = [word for word in words[1:] if word != LANGUAGE and not word.startswith(ENVIRONMENT)]
    told = [json.loads(word[len(ENVIRONMENT) :]) for word in words if word.startswith(ENVIRONMENT)]
    variables = told[-1].pop("env_vars", {}) if told else {}
    plain = all(not value or (name == "py_executable" and value == python) for one in told for name, value in one.items())
    plain = plain and LANGUAGE in words and not any("$" in value for value in variables.values())
    return (rest, variables) if plain and rest and os.path.basename(rest[0]) == WORKER else ([], {})


def made(path: str, words: list[str], variables: dict[str, str]) -> None:
    """Have the worker made and end as it ends; returns where it was not made."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(ANSWER_SECONDS)
    wanted = {"words": words, "folder": os.getcwd(), "environment": variables, "nice": os.nice(0), "oom": own("oom_score_adj")}
    content = json.dumps(wanted).encode("utf-8", "surrogateescape")
    try:
        connection.connect(path)
        socket.send_fds(connection, [len(content).to_bytes(8, "little")], [0, 1, 2])
        connection.sendall(content)
        process = int.from_bytes(connection.recv(8), "little")
    except OSError:
        return
    if not process:
        return
    connection.settimeout(None)
    answer = connection.recv(8)  # when it has ended; this process is killed: the server ends it
    os._exit(int.from_bytes(answer, "little") if answer else 1)


def own(name: str) -> str:
    with open(f"/proc/self/{name}") as file:
        return file.read()


if __name__ == "__main__":
    main()
