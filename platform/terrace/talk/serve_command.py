"""`terrace serve MODEL`: a model over HTTP in OpenAI's form, with a page to try it."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
from pathlib import Path

from terrace.errors import InputError
from terrace.talk.chat_command import add_loading_arguments, count, load_talker, share_of
from terrace.talk.model_place import model_directory

KEY_VARIABLE = "TERRACE_API_KEY"


def register(subparsers: argparse._SubParsersAction) -> None:
    serve = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP in OpenAI's form, with a page to try it",
        description="Answers POST /v1/chat/completions (pictures as data URIs, streams) and GET /v1/models; / is a page to try it."
        f" The environment variable {KEY_VARIABLE}, where it is set, is the key that requests must bring; addresses other than this"
        " machine's own want one.",
    )
    serve.add_argument("model", type=Path, help="model directory or run directory")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="0: any free one (8000)")
    serve.add_argument("--name", help="under which the model is asked for (default: the run's or the directory's)")
    add_loading_arguments(serve)
    serve.add_argument("--max-new-tokens", type=count, default=4096, metavar="N", help="most tokens that a request may ask for (4096)")
    serve.add_argument("--temperature", type=share_of(2), default=0.0, help="of requests that name none; 0: the likeliest answer (0)")
    serve.add_argument("--max-request-mib", type=count, default=64, metavar="N", help="largest request (64)")
    serve.add_argument("--max-waiting", type=count, default=32, metavar="N", help="requests that wait before others are refused (32)")
    serve.add_argument(
        "--allow-images-from", action="append", default=[], metavar="HOST", help="fetch pictures from this host (repeatable; default: none)"
    )
    serve.set_defaults(main=serve_command)


def serve_command(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    model_directory(arguments.model)  # a wrong name is refused before anything slow is loaded
    import uvicorn

    from terrace.talk.request import Limits
    from terrace.talk.server import LOOPBACK, Service, Settings

    key = os.environ.get(KEY_VARIABLE) or None
    if arguments.host not in LOOPBACK and key is None:
        raise InputError(f"--host {arguments.host}: others can reach it, so set {KEY_VARIABLE} to a key that requests must bring")
    listening = _listen(arguments.host, arguments.port)
    try:
        talker = load_talker(arguments)
        limits = Limits(max_tokens=arguments.max_new_tokens, request_bytes=arguments.max_request_mib * 2**20)
        name = arguments.name or model_name(talker.model.directory)
        hosts = LOOPBACK if arguments.host in LOOPBACK else ("*",)
        settings = Settings(
            name, key, hosts, tuple(arguments.allow_images_from), arguments.max_waiting, min(1024, arguments.max_new_tokens),
            arguments.temperature, limits,
        )  # fmt: skip
        port = listening.getsockname()[1]
        shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"{name} at http://{shown}:{port} (a page to try it; the API is http://{shown}:{port}/v1)", flush=True)
        config = uvicorn.Config(Service(talker, settings).application(), log_level="warning", timeout_graceful_shutdown=3)
        with contextlib.suppress(KeyboardInterrupt):  # how a server is told to stop
            uvicorn.Server(config).run(sockets=[listening])
        talker.model.engine.close()
    finally:
        listening.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """The socket, before the model is loaded: a port that is taken is said at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, reuse_port=False)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from error


def model_name(directory: Path) -> str:
    """A run's name where the directory is a stage's `final/`, otherwise the directory's own. A run that lies in a folder called `run`, as
    `terrace init` proposes it, is called by the folder around it."""
    real = directory.resolve()
    if real.name != "final" or real.parent.parent.name != "stages":
        return real.name
    run = real.parent.parent.parent
    return run.parent.name if run.name == "run" and run.parent.name else run.name
