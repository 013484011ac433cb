"""The native rollout engine: batched decoding on the training model, any device, live weights.

1. *Prefill*: prompts run as one pack through the training forward; their keys and values are kept, one copy per prompt for all of
   its G samples.
2. *Decode*: every step feeds one token of each unfinished sequence through the language layers as one row of tokens. The
   cache (`cache.py`) attends to the shared prompt and to the sequence's own tokens.
3. *Continuous*: where a sequence has ended, the next one begins (`sequences.py`). Once no prompt is left, finished rows leave
   the batch as soon as they are a quarter of it.

Sampling inverts the cumulative distribution at a uniform number that depends on (seed, prompt, sample, place) alone, so what else
is in the batch, and when, does not matter. Media tokens have probability 0, and log-probabilities are those of the distribution
without them.

Between two steps the weights may be replaced (`replacing`), also from another thread: keys and values so far stay as they are, and
every token is kept with the number of the weights that sampled it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from terrace.data.types import PackedExample, joined_pixels
from terrace.generation.cache import SharedPromptCache
from terrace.generation.interface import GroupReady, Heard, Prompt, Response, Sampling
from terrace.generation.native_turns import Wave as TurnsWave
from terrace.generation.sampling import sample_tokens
from terrace.generation.sequences import Sequences
from terrace.generation.turns import React, converse_again
from terrace.generation.usage import Usage
from terrace.models.batch import to_device
from terrace.models.compiled_step import CompiledStep
from terrace.models.decode_step import DecodeStep, rotated_axes, usual
from terrace.models.families.registry import family_of_model, output_layer
from terrace.models.native_code import NotCompiled
from terrace.models.precision import DTYPES, compute_context
from terrace.models.shared_prompt import Unit, decode_logits, units_hidden

LOGGER = logging.getLogger(__name__)
COMPACT_SHARE = 0.25  # once no prompt is left, rows leave the batch when this share of them has finished
REFILL_SHARE = 1 / 16  # of the rows: as long as fewer are free, a step more costs less than a prefill for them
PAUSE = 0.002  # seconds until a source that had no prompt is asked again


class NativeEngine:
    """See interface.RolloutEngine. `model` is the transformers model with shared-prompt attention and whole parameters."""

    def __init__(
        self,
        model: Any,
        forbidden: Sequence[int],
        stop: Sequence[int],
        device: str,
        precision: str,
        max_rows: int = 256,
        compiled: bool = False,
    ) -> None:
        """`compiled`: decode with the compiled step where the model and this machine have one."""
        self._model, self._device, self._precision, self._max_rows = model, torch.device(device), precision, max_rows
        self._forbidden = torch.tensor(sorted(forbidden), dtype=torch.int64, device=self._device)
        self._stop = torch.tensor(sorted(stop), dtype=torch.int64, device=self._device)
        self._gate = _Gate()
        self.version = 0  # of the weights: that of the last `replacing`
        self.usage = Usage()
        self._step: DecodeStep | None = None
        self._compiled = compiled

    def generate(
        self, prompts: Iterable[Prompt | None], sampling: Sampling, ready: GroupReady | None = None, heard: Heard | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Response]]:  # fmt: skip
        """At most `max_rows` sequences at a time, prompts in order, asked for when there is room (None: not now, ask again). `heard` is
        told every token as it comes. Once `stop` says so, what is not complete is given up."""
        training = self._model.training
        self._model.eval()
        self._step = self._short_step()
        try:
            with torch.no_grad(), compute_context(self._precision, str(self._device)):
                return self._continuous(iter(prompts), sampling, ready, heard, stop)
        finally:
            self._model.train(training)

    def converse(
        self, prompts: Sequence[Prompt], sampling: Sampling, react: React, done: Callable[[int, list[Response]], None]
    ) -> list[list[Response]]:
        """See turns.converse: here nothing that was read once is read again, but where layers read or ask for pictures."""
        family = family_of_model(self._model).family
        if family.crosses or family.asks_kinds:
            return converse_again(self, prompts, sampling, react, done)
        per_wave = max(1, self._max_rows // sampling.samples)
        training, dtype = self._model.training, DTYPES[self._precision]
        self._model.eval()

        def sample(logits: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return sample_tokens(logits, draws, self._forbidden, sampling)

        groups: list[list[Response]] = []
        try:
            with torch.no_grad(), compute_context(self._precision, str(self._device)):
                for start in range(0, len(prompts), per_wave):
                    some = prompts[start : start + per_wave]
                    wave = TurnsWave(self._model, some, sampling, self._device, dtype, prompts_as_pack, sample, self._stop)
                    groups += wave.run(react, done, start)
        finally:
            self._model.train(training)
        return groups

    @contextmanager
    def replacing(self, version: int) -> Iterator[None]:
        """The weights may be changed inside: no step runs meanwhile. Tokens are then those of `version`."""
        with self._gate.closed():
            yield
            self.version = version

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]], version: int = 0) -> None:
        """Nothing but their number: the weights are the training model's own."""
        self.version = version

    def together(self) -> AbstractContextManager[None]:
        """Each rank decodes on its own."""
        return nullcontext()

    def sleep(self) -> None:
        """Nothing is held between calls."""

    def wake(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing is held outside this process."""

    # ------------------------------------------------------------ decoding

    def _continuous(
        self, prompts: Iterator[Prompt | None], sampling: Sampling, ready: GroupReady | None, heard: Heard | None, stop: Callable[[], bool]
    ) -> list[list[Response]]:
        found: dict[int, list[Response]] = {}

        def complete(place: int, group: list[Response]) -> None:
            found[place] = group
            if ready is not None:
                ready(place, group)

        source = _Source(prompts)
        first = source.take(max(1, self._max_rows // sampling.samples))
        rows = max(1, self._max_rows // sampling.samples) * sampling.samples  # whole groups, however few rows are allowed
        state = Sequences(min(rows, len(first) * sampling.samples) if source.empty else rows, sampling, complete, heard)
        cache = SharedPromptCache(state.rows)
        while not stop():
            with self._gate.step():
                if first or state.free >= max(1, int(state.rows * REFILL_SHARE)):
                    self._refill(source, first, state, cache, sampling)
                    first = []
                live = state.rows - state.free
                if source.empty and not state.waiting:
                    if not live:
                        break
                    if live <= (1 - COMPACT_SHARE) * state.rows:
                        cache.keep_rows(state.keep_live())
                if live:
                    began = time.time()
                    asked, logits = self._decode(state, cache)
                    cache.advance()
                    self._sample(logits, asked, state, cache, sampling)
                    self.usage.step(rows, live, began)
            if state.free == state.rows:
                self.usage.end()
                time.sleep(PAUSE)  # for the next prompt
        self.usage.end()
        return [found[place] for place in sorted(found)]

    def _refill(self, source: _Source, first: list[Prompt], state: Sequences, cache: SharedPromptCache, sampling: Sampling) -> None:
        """Let sequences begin in the free rows, prompts prefilled as they are needed."""
        while state.free:
            prompts = first
            if not first and not state.waiting:
                prompts = source.take(-(-state.free // sampling.samples))
            if not prompts and not state.waiting:
                return
            if prompts:
                with self.usage.prefill():
                    hidden, packed, units = self._prefill(prompts)
                    numbers = state.wait(prompts, hidden)
                    cache.add_prompts(numbers, packed, units, set(state.waiting_prompts))
            first = []
            rows, hidden = state.begin()
            if len(rows):
                cache.begin(rows, state.number_of_row[rows])
                self._sample(output_layer(self._model)(hidden).float(), rows, state, cache, sampling)

    def _sample(self, logits: torch.Tensor, rows: np.ndarray, state: Sequences, cache: SharedPromptCache, sampling: Sampling) -> None:
        """The next token of each of these rows."""
        tokens, logprobs = sample_tokens(logits, self._on_device(state.draws(rows)), self._forbidden, sampling)
        stopped = (tokens.unsqueeze(1) == self._stop).any(dim=1)
        ended = state.record(rows, tokens.cpu().numpy(), logprobs.cpu().numpy(), stopped.cpu().numpy(), self.version)
        if len(ended):
            cache.end(ended)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor, torch.Tensor]], list[Unit]]:
        """Hidden states [B, hidden] of the last prompt tokens; keys and values per layer, and which of them are whose."""
        example = prompts_as_pack(prompts)
        batch = to_device(example, self._device, DTYPES[self._precision])
        starts = [0, *example.segment_ends[:-1].tolist()]
        units = [Unit(start, len(prompt.input_ids)) for start, prompt in zip(starts, prompts)]
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        hidden = units_hidden(self._model, batch, units, kept)
        return hidden[self._on_device(example.segment_ends.astype(np.int64) - 1)], kept, units

    def _short_step(self) -> DecodeStep | None:
        """The step with fewer operations, for models of the usual kind; compiled where that was asked for and can be had."""
        known = usual(self._model)
        if self._compiled and self._step is None:
            try:
                self._step = self._compiled_step(known)
                LOGGER.info("decoding steps are compiled")
            except NotCompiled as reason:
                LOGGER.warning("decoding steps are not compiled: %s", reason)
                self._compiled = False
        if not known:
            return None
        if isinstance(self._step, CompiledStep):
            self._step.begin()
        return self._step or DecodeStep(self._model)

    def _compiled_step(self, known: bool) -> CompiledStep:
        """Raises NotCompiled. Weights in float32 are not enough: under another precision the cache holds other numbers."""
        if self._precision != "fp32":
            raise NotCompiled(f"the compiled step wants precision fp32, not {self._precision}")
        if not known:
            raise NotCompiled("the compiled step wants a language model of the usual kind, without adapters")
        return CompiledStep(self._model)

    def _decode(self, state: Sequences, cache: SharedPromptCache) -> tuple[np.ndarray, torch.Tensor]:
        """Rows, and their logits float32 [A, V] after one more token of each: all rows, or those that have a sequence."""
        positions, tokens = state.positions, state.newest
        axes = rotated_axes(positions)
        if isinstance(self._step, CompiledStep) and axes is not None:
            rows = np.flatnonzero(state.live)
            return rows, self._step.logits_of(rows, tokens[rows], axes[rows], cache)
        rows = np.arange(state.rows)
        if self._step is not None and axes is not None:
            return rows, self._step.logits(self._on_device(tokens), axes, cache)
        return rows, decode_logits(self._model, self._on_device(tokens), self._on_device(positions), cache)


class _Source:
    """Prompts that are asked for as they are needed. None among them: there is none now, but later."""

    def __init__(self, prompts: Iterator[Prompt | None]) -> None:
        self._prompts = prompts
        self.empty = False

    def take(self, count: int) -> list[Prompt]:
        """At most `count` prompts; fewer where there are no more."""
        found: list[Prompt] = []
        while len(found) < count and not self.empty:
            try:
                prompt = next(self._prompts)
            except StopIteration:
                self.empty = True
                break
            if prompt is None:
                break
            found.append(prompt)
        return found


class _Gate:
    """Steps pass one at a time; whoever closes it waits for the running one and is not overtaken by the next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = self._stepping = False

    @contextmanager
    def step(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._stepping = True
        try:
            yield
        finally:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: not self._stepping)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


def prompts_as_pack(prompts: Sequence[Prompt]) -> PackedExample:
    """Prompts one after another, one segment each."""
    lengths = [len(prompt.input_ids) for prompt in prompts]
    return PackedExample(
        pack=0,
        input_ids=np.concatenate([prompt.input_ids for prompt in prompts]),
        targets=np.full(sum(lengths), -100, np.int32),
        position_ids=np.concatenate([prompt.positions for prompt in prompts], axis=1),
        segment_ends=np.cumsum(lengths).astype(np.int32),
        **joined_pixels(prompts),
        sample_ids=[prompt.id for prompt in prompts],
        sources=[prompt.key[0] for prompt in prompts],
        kinds=["prompt"] * len(prompts),
        sequence_length=sum(lengths),
    )
