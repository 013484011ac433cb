"""A loaded model that one talks to: a conversation in, its answer out, piece by piece as it comes.

Pictures and text go through the template and the preprocessing of training, so what is said here is what the model learned
to say. One conversation is answered at a time: the native engine decodes one on the whole machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.data.image_files import ImageDamage
from terrace.data.images import image_size
from terrace.data.prompt import read_prompt
from terrace.errors import InputError
from terrace.evaluate.engine import Model, load_model
from terrace.families.configurations import language_config
from terrace.generation.interface import Prompt, Sampling
from terrace.generation.tokens import stop_tokens
from terrace.talk.conversation import Turn, as_sample
from terrace.talk.text_stream import TextStream

Hear = Callable[[int, str], None]  # (number of the answer, its next piece of text)


class Enough(Exception):
    """Raised by a listener who wants no more: generation ends at once."""


@dataclass(frozen=True)
class Wishes:
    """How an answer is to be: at most so many tokens, how it is sampled (temperature 0: the likeliest), what ends it."""

    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    answers: int = 1


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    finished: bool  # by itself or at a stop word; else it was cut at the length limit


@dataclass(frozen=True)
class Said:
    answers: list[Answer]
    prompt_tokens: int


class Talker:
    def __init__(self, model: Model, longest: int) -> None:
        self.model, self.longest = model, longest
        self._turn = threading.Lock()
        self._stops = set(stop_tokens(model.tokenizer, _config(model.directory)))

    def prompt(self, turns: Sequence[Turn]) -> Prompt:
        """The conversation as the model reads it. Raises InputError for pictures that cannot be used and for what has no form."""
        sample, images = as_sample(turns, "conversation")
        try:
            sizes = [image_size(data) for data in images]
            read = read_prompt(sample, images, sizes, self.model.tokenizer, self.model.sight.family, self.model.sight.pixels)
        except ImageDamage as error:
            raise InputError(f"a picture cannot be used: {error}") from error
        except ValueError as error:  # of the family: what has no form in its conversations
            raise InputError(str(error)) from error
        return Prompt(**vars(read.inputs), key=("conversation", 0), id="conversation")

    def room(self, prompt: Prompt) -> int:
        """Tokens that an answer may have. Raises InputError where the conversation leaves none."""
        left = self.longest - len(prompt.input_ids)
        if left < 1:
            raise InputError(
                f"the conversation has {len(prompt.input_ids)} tokens, the model takes {self.longest} with its answer; begin anew, or show"
                " smaller pictures (--pixels)"
            )
        return left

    def answer(
        self, prompt: Prompt, wishes: Wishes, hear: Hear | None = None, gone: Callable[[], bool] = lambda: False
    ) -> Said:
        """Answer; `hear` is told each piece of text as it comes, and may raise Enough, which ends all answers early, as does
        `gone`, which is asked at every token: whoever wanted the answer has left."""
        most = min(wishes.max_tokens, self.room(prompt))
        seed = wishes.seed if wishes.seed is not None else random.getrandbits(31)
        streams = [TextStream(self.model.tokenizer.decode, wishes.stop) for _ in range(wishes.answers)]
        texts, counts, ended = [""] * wishes.answers, [0] * wishes.answers, [False] * wishes.answers

        def tell(sample: int, text: str) -> None:
            if text:
                texts[sample] += text
                if hear is not None:
                    hear(sample, text)

        def heard(_: int, sample: int, tokens: Sequence[int]) -> None:
            if gone():
                raise Enough
            if streams[sample].stopped:
                return
            counts[sample] += len(tokens)
            ended[sample] |= tokens[-1] in self._stops
            tell(sample, streams[sample].push([token for token in tokens if token not in self._stops]))
            if all(stream.stopped for stream in streams):
                raise Enough

        with self._turn, contextlib.suppress(Enough):
            if gone():
                raise Enough
            sampling = Sampling(wishes.answers, most, wishes.temperature, wishes.top_p, seed)
            self.model.engine.generate([prompt], sampling, heard=heard)
            for sample, stream in enumerate(streams):
                tell(sample, stream.end())
        answers = [Answer(text, count, end or stream.stopped) for text, count, end, stream in zip(texts, counts, ended, streams)]
        return Said(answers, len(prompt.input_ids))


def open_talker(
    directory: Path, engine: str = "auto", device: str | None = None, precision: str | None = None, pixels: tuple[int, int] | None = None
) -> Talker:
    """Load a model directory. `auto`: vLLM where it is installed for a GPU of this machine, otherwise the native engine."""
    model = load_model(directory, device, precision, pixels=pixels, engine=chosen_engine(engine, device))
    longest = int(language_config(_config(directory)).max_position_embeddings)
    return Talker(model, getattr(model.engine, "longest", longest))


def chosen_engine(engine: str, device: str | None) -> str:
    if engine != "auto":
        return engine
    import torch

    on_gpu = (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    return "vllm" if on_gpu and importlib.util.find_spec("vllm") is not None else "native"


def _config(directory: Path) -> Any:
    from terrace.models.build import directory_config

    return directory_config(directory)
