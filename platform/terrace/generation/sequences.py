"""The sequences that a decoding batch works on, on the host: which waits, which decodes in which row, and what it has said.

A prompt's samples wait with its last hidden state until a row is free; they begin in order, the lowest free row first. Everything
here follows from the prompts and from the lengths of responses, so a batch runs the same way every time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from terrace.generation.interface import Heard, Prompt, Response, Sampling, uniforms

FIRST_ROOM = 64


@dataclass
class _Group:
    """A prompt and the responses that it has so far."""

    prompt: Prompt
    missing: int
    responses: list[Response | None] = field(default_factory=list)


class Sequences:
    """`complete` is told the place of a prompt (in the order of `wait`) with its responses, `heard` every token."""

    def __init__(
        self, rows: int, sampling: Sampling, complete: Callable[[int, list[Response]], None], heard: Heard | None = None
    ) -> None:
        self._sampling, self._complete, self._heard = sampling, complete, heard
        self._groups: dict[int, _Group] = {}
        self._asked = 0  # prompts so far
        self._waiting: deque[tuple[int, int, torch.Tensor]] = deque()  # (prompt, sample, hidden state [1, H])
        self._room = min(FIRST_ROOM, sampling.max_tokens)
        self.live = np.zeros(rows, bool)
        self.free = rows  # rows without a sequence
        self.number_of_row = np.full(rows, -1, np.int64)  # the prompt's place
        self._sample_of_row = np.zeros(rows, np.int64)
        self._lengths = np.zeros(rows, np.int64)
        self._next = np.zeros((0, rows), np.int64)  # [P, rows]: the position of the first token of the response
        self._noise = np.zeros((rows, sampling.max_tokens))
        self._tokens = np.zeros((rows, self._room), np.int32)
        self._logprobs = np.zeros((rows, self._room), np.float32)
        self._versions = np.zeros((rows, self._room), np.int32)

    @property
    def rows(self) -> int:
        return len(self.live)

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def waiting_prompts(self) -> list[int]:
        return [number for number, _, _ in self._waiting]

    def wait(self, prompts: Sequence[Prompt], hidden: torch.Tensor) -> list[int]:
        """The samples of these prompts wait; hidden [B, H] of their last tokens. Returns the prompts' places."""
        numbers = list(range(self._asked, self._asked + len(prompts)))
        self._asked += len(prompts)
        samples = self._sampling.samples
        for place, (number, prompt) in enumerate(zip(numbers, prompts)):
            self._groups[number] = _Group(prompt, samples, [None] * samples)
            self._waiting.extend((number, sample, hidden[place : place + 1]) for sample in range(samples))
        return numbers

    def begin(self) -> tuple[np.ndarray, torch.Tensor]:
        """Waiting sequences begin in free rows: the rows, and the hidden states [rows, H] that their first tokens come from."""
        rows = np.flatnonzero(~self.live)[: len(self._waiting)]
        states = []
        for row in rows.tolist():
            number, sample, hidden = self._waiting.popleft()
            prompt = self._groups[number].prompt
            if not len(self._next):
                self._next = np.zeros((len(prompt.next_positions), self.rows), np.int64)
            self.number_of_row[row], self._sample_of_row[row], self._lengths[row] = number, sample, 0
            self._noise[row] = uniforms(self._sampling.seed, prompt, sample, self._sampling.max_tokens)
            self._next[:, row] = prompt.next_positions
            states.append(hidden)
        self.live[rows] = True
        self.free -= len(rows)
        return rows, torch.cat(states) if states else torch.zeros(0)

    @property
    def newest(self) -> np.ndarray:
        """int64 [rows]: the last token of each row."""
        return self._tokens[np.arange(self.rows), np.maximum(self._lengths, 1) - 1].astype(np.int64)

    @property
    def positions(self) -> np.ndarray:
        """int64 [P, rows] of `newest`."""
        return self._next + np.maximum(self._lengths, 1) - 1

    def draws(self, rows: np.ndarray) -> np.ndarray:
        """float64 [rows]: the random number of the next token of each."""
        return self._noise[rows, np.minimum(self._lengths[rows], self._sampling.max_tokens - 1)]

    def record(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, stopped: np.ndarray, version: int) -> np.ndarray:
        """Note the next token of these rows, where they have a sequence. Returns the rows whose sequences have ended."""
        if self.free:
            counts = self.live[rows]
            rows, tokens, logprobs, stopped = rows[counts], tokens[counts], logprobs[counts], stopped[counts]
        places = self._lengths[rows]
        self._grow(int(places.max(initial=0)) + 1)
        self._tokens[rows, places], self._logprobs[rows, places], self._versions[rows, places] = tokens, logprobs, version
        self._lengths[rows] += 1
        if self._heard is not None:
            for row, token in zip(rows.tolist(), tokens.tolist()):
                self._heard(int(self.number_of_row[row]), int(self._sample_of_row[row]), [token])
        ends = stopped | (self._lengths[rows] >= self._sampling.max_tokens)
        ended = rows[ends]
        self.live[ended] = False
        self.free += len(ended)
        for row, finished in zip(ended.tolist(), stopped[ends].tolist()):
            self._end(row, finished)
        return ended

    def _grow(self, room: int) -> None:
        if room > self._room:
            self._room = min(max(room, 2 * self._room), self._sampling.max_tokens)
            wider = [(0, 0), (0, self._room - self._tokens.shape[1])]
            self._tokens, self._logprobs = np.pad(self._tokens, wider), np.pad(self._logprobs, wider)
            self._versions = np.pad(self._versions, wider)

    def _end(self, row: int, finished: bool) -> None:
        number, said = int(self.number_of_row[row]), slice(0, int(self._lengths[row]))
        group = self._groups[number]
        group.responses[int(self._sample_of_row[row])] = Response(
            self._tokens[row, said].copy(), self._logprobs[row, said].copy(), bool(finished), versions=self._versions[row, said].copy()
        )
        group.missing -= 1
        if not group.missing:
            del self._groups[number]
            self._complete(number, group.responses)  # type: ignore[arg-type]

    def keep_live(self) -> np.ndarray:
        """Leave out the rows without a sequence. Returns those that are kept, ascending."""
        kept = np.flatnonzero(self.live)
        for name in ("live", "number_of_row", "_sample_of_row", "_lengths", "_noise", "_tokens", "_logprobs", "_versions"):
            setattr(self, name, getattr(self, name)[kept])
        self._next, self.free = self._next[:, kept], 0
        return kept
