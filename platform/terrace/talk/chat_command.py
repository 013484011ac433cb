"""`terrace chat MODEL`: a conversation with a model in the terminal, or one answer per line of a pipe."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from terrace.errors import InputError, TerraceError
from terrace.talk.model_place import model_directory

ORDERS = ("/image", "/new", "/history", "/help", "/quit")
HELP = "/image FILE shows a picture with the next question, /new begins anew, /history tells what was said, /quit ends"


def register(subparsers: argparse._SubParsersAction) -> None:
    chat = subparsers.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model: a stage's final/, a published checkpoint, or a run directory (its newest complete stage)."
        f" In the terminal, {HELP}; Ctrl-C stops an answer. In a pipe each line is a question, and answers alone are printed.",
    )
    chat.add_argument("model", type=Path, help="model directory or run directory")
    chat.add_argument("--image", action="append", type=Path, default=[], metavar="FILE", help="picture of the first question (repeatable)")
    chat.add_argument("--ask", metavar="TEXT", help="ask this, print the answer and end")
    chat.add_argument("--system", metavar="TEXT", help="what stands before the conversation (default: what the family puts there)")
    add_loading_arguments(chat)
    chat.add_argument("--max-new-tokens", type=count, default=1024, metavar="N", help="longest answer (1024)")
    chat.add_argument("--temperature", type=share_of(2), default=0.0, help="0: the likeliest answer (0)")
    chat.add_argument("--top-p", type=share_of(1), default=1.0, help="sample among the tokens that together reach this share (1)")
    chat.add_argument("--seed", type=int, help="of the sampling (default: another one each time)")
    chat.set_defaults(main=chat_command)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded, for all that talk."""
    parser.add_argument(
        "--engine", choices=("auto", "native", "vllm"), default="auto", help="what decodes (auto: vllm on a GPU where it is installed)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--pixels", nargs=2, type=count, metavar=("MIN", "MAX"), help="of a resized picture (default: the model's own)")


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def share_of(most: float) -> Any:
    def read(text: str) -> float:
        value = float(text)
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from 0 to {most:g}")
        return value

    read.__name__ = "number"
    return read


def load_talker(arguments: argparse.Namespace) -> Any:
    """The model that a command line names; says so on the terminal, since it may take a while."""
    directory = model_directory(arguments.model)
    if sys.stderr.isatty():
        print(f"loading {directory}", file=sys.stderr)
    pixels = tuple(arguments.pixels) if arguments.pixels else None
    if pixels and pixels[0] > pixels[1]:
        raise InputError(f"--pixels: {pixels[0]} is more than {pixels[1]}")
    from terrace.talk.talker import open_talker  # loads torch, so only once what was asked for is there

    return open_talker(directory, arguments.engine, arguments.device, arguments.precision, pixels)


def chat_command(arguments: argparse.Namespace) -> int:
    pictures = [read_picture(file) for file in arguments.image]
    interactive = arguments.ask is None and sys.stdin.isatty()
    talker = load_talker(arguments)
    from terrace.talk.talker import Wishes

    wishes = Wishes(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    chat = Chat(talker, wishes, arguments.system, pictures)
    if interactive:
        _converse(chat)
        return 0
    for question in [arguments.ask] if arguments.ask is not None else _lines():
        if chat.obeys(question):
            continue
        chat.ask(question, _write)
        _write("\n")
    return 0


def read_picture(file: Path) -> bytes:
    """The bytes of a picture. Raises InputError where there is none."""
    from terrace.data.image_files import ImageDamage
    from terrace.data.images import image_size

    try:
        if not file.is_file():
            raise InputError(f"{file}: there is no such file; name a picture")
        data = file.read_bytes()
        image_size(data)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; name a picture") from error
    except ImageDamage as error:
        raise InputError(f"{file}: {error}") from error
    return data


class Chat:
    """The turns so far, and the pictures that go with the next question."""

    def __init__(self, talker: Any, wishes: Any, system: str | None, pictures: list[bytes]) -> None:
        self._talker, self._wishes, self._system, self.pictures = talker, wishes, system, pictures
        self.turns: list[Any] = []
        self.anew()

    def anew(self) -> None:
        from terrace.talk.conversation import Turn

        self.turns = [Turn("system", (self._system,))] if self._system is not None else []

    def obeys(self, line: str) -> bool:
        """Whether the line was an order and not a question; it is carried out. Raises EOFError for /quit, InputError."""
        order, _, rest = line.strip().partition(" ")
        if order == "/image":
            self.pictures.append(read_picture(Path(rest.strip()).expanduser()))
        elif order == "/new":
            self.anew()
        elif order == "/quit":
            raise EOFError
        elif order == "/history":
            for turn in self.turns:
                said = "".join("[picture]" if isinstance(part, bytes) else part for part in turn.content)
                _write(f"{turn.role}: {said}\n")
        elif order == "/help":
            _write(HELP + "\n")
        elif close := difflib.get_close_matches(order, ORDERS, 1, 0.75) if order.startswith("/") else []:
            raise InputError(f"there is no {order}; did you mean {close[0]}?")
        else:
            return not line.strip() and not self.pictures
        return True

    def ask(self, question: str, write: Any) -> None:
        """Ask, write the answer as it comes, and remember both. A question that cannot be asked, or was stopped before a word came, is
        forgotten; its pictures go with the next one."""
        from terrace.talk.conversation import Turn

        turn = Turn("user", (*self.pictures, *([question] if question else ())))
        said: list[str] = []

        def hear(_: int, text: str) -> None:
            said.append(text)
            write(text)

        prompt = self._talker.prompt([*self.turns, turn])
        pictures, self.pictures, ended = self.pictures, [], False
        try:
            self._talker.answer(prompt, self._wishes, hear)
            ended = True
        finally:  # an answer that was stopped stays as far as it came
            if said or ended:
                self.turns += [turn, Turn("assistant", ("".join(said),))]
            else:
                self.pictures = pictures


def _converse(chat: Chat) -> None:
    """The terminal's loop, until the end of input."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited and called back)
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if not chat.pictures else f"[{len(chat.pictures)} picture{'s' if len(chat.pictures) > 1 else ''}] > ")
            if not chat.obeys(line):
                chat.ask(line, _write)
                _write("\n")
        except EOFError:
            _write("\n")
            return
        except KeyboardInterrupt:
            _write("\n")
        except TerraceError as error:
            print(f"terrace: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\n")


def _write(text: str) -> None:
    """What a model says may hold anything: to a terminal no control characters go."""
    if sys.stdout.isatty():
        text = "".join(letter for letter in text if letter in "\n\t" or letter.isprintable())
    sys.stdout.write(text)
    sys.stdout.flush()
