"""Conversations on the training model itself: what was computed of a prompt, an answer or an observation is kept and never again.

Per turn all conversations of a wave decode together; each is reacted to when its answer ends, while the others still decode. Then the
observations run as one pack, each with the last token of the answer before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from terrace.data.types import PromptInputs
from terrace.generation.interface import Prompt, Response, Sampling, uniforms
from terrace.generation.turns import Ends, React, Talk
from terrace.generation.turns_cache import TurnsCache
from terrace.models.batch import to_device
from terrace.models.families.registry import output_layer
from terrace.models.forward import hidden_states
from terrace.models.shared_prompt import Unit, decode_logits, units_hidden


class Wave:
    """The conversations with some prompts. `pack` lays prompts out as a pack, `sample` draws a token per row of logits."""

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], sampling: Sampling, device: torch.device, dtype: torch.dtype,
        pack: Callable[[Sequence[Any]], Any], sample: Callable[..., tuple[torch.Tensor, torch.Tensor]], stop: torch.Tensor,
    ) -> None:  # fmt: skip
        self._model, self._sampling, self._device, self._dtype = model, sampling, device, dtype
        self._pack, self._sample, self._stop = pack, sample, stop
        self._prompts = prompts
        self.talks = [[Talk(prompt, number) for number in range(sampling.samples)] for prompt in prompts]
        self.cache: TurnsCache | None = None

    def run(self, react: React, done: Callable[[int, list[Response]], None], start: int) -> list[list[Response]]:
        """All groups. `start`: the number of the first prompt for `react` and `done`."""
        samples = self._sampling.samples
        ends = Ends(self.talks, done, start)
        logits = self._prefill().repeat_interleave(samples, dim=0)
        going = [(place, sample) for place in range(len(self._prompts)) for sample in range(samples)]
        while True:
            pending: dict[tuple[int, int], Future[PromptInputs | None]] = {}
            self._answers(going, logits, lambda key, answer: self._answered(key, answer, react, start, pending))  # noqa: B023
            going = ends.reactions(pending)
            if not going:
                return ends.groups()
            logits = self._read(going)

    def _answered(self, key: tuple[int, int], answer: Response, react: React, start: int, pending: dict[Any, Any]) -> None:
        self._talk(key).answered(answer)
        pending[key] = react(start + key[0], key[1], answer)

    def _talk(self, key: tuple[int, int]) -> Talk:
        return self.talks[key[0]][key[1]]

    def _rows(self, going: Sequence[tuple[int, int]]) -> torch.Tensor:
        return torch.tensor([place * self._sampling.samples + sample for place, sample in going], device=self._device)

    # ------------------------------------------------------------ forward passes

    def _prefill(self) -> torch.Tensor:
        """Logits float32 [B, V] behind the prompts."""
        example = self._pack(self._prompts)
        ends = example.segment_ends.astype(np.int64)
        units = [Unit(int(end) - len(prompt.input_ids), len(prompt.input_ids)) for end, prompt in zip(ends, self._prompts)]
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        hidden = units_hidden(self._model, to_device(example, self._device, self._dtype), units, kept)
        self.cache = TurnsCache(kept, units, self._sampling.samples)
        return output_layer(self._model)(hidden[torch.from_numpy(ends - 1).to(self._device)]).float()

    def _read(self, going: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Logits float32 [A, V] behind the observations of these conversations."""
        assert self.cache is not None
        unread = [replace(talk.prompt, **vars(talk.unread)) for talk in map(self._talk, going)]
        example = self._pack(unread)
        self.cache.feed(self._rows(going), [len(one.input_ids) for one in unread])
        hidden = hidden_states(self._model, to_device(example, self._device, self._dtype), decode=self.cache)
        self.cache.fed()
        last = torch.from_numpy(example.segment_ends.astype(np.int64) - 1).to(self._device)
        return output_layer(self._model)(hidden[last]).float()

    def _answers(
        self, going: Sequence[tuple[int, int]], logits: torch.Tensor, answered: Callable[[tuple[int, int], Response], None]
    ) -> None:
        """Decode one answer of each; `answered` hears of each as soon as it ends."""
        assert self.cache is not None
        following = [self._talk(key).parts[-1] if self._talk(key).parts else self._talk(key).prompt for key in going]
        positions = torch.from_numpy(np.stack([part.next_positions for part in following])).to(self._device)  # [A, P]
        longest = self._sampling.max_tokens
        noise = np.stack([
            uniforms(self._sampling.seed, replace(self._talk(key).prompt, turn=len(self._talk(key).answers)), key[1], longest)
            for key in going
        ])  # fmt: skip
        said: list[tuple[list[int], list[float]]] = [([], []) for _ in going]
        live = list(range(len(going)))
        for step in range(longest):
            draws = torch.from_numpy(noise[live, step]).to(self._device)
            tokens, logprobs = self._sample(logits, draws)
            stopped = torch.isin(tokens, self._stop).tolist()
            for number, token, logprob in zip(live, tokens.tolist(), logprobs.tolist()):
                said[number][0].append(token)
                said[number][1].append(logprob)
            last = step + 1 == longest
            stays = [place for place, end in enumerate(stopped) if not end and not last]
            for place, number in enumerate(live):
                if stopped[place] or last:
                    own, values = said[number]
                    answered(going[number], Response(np.asarray(own, np.int32), np.asarray(values, np.float32), stopped[place]))
            if not stays:
                return
            live = [live[place] for place in stays]
            self.cache.feed(self._rows([going[number] for number in live]), [1] * len(live))
            logits = decode_logits(self._model, tokens[torch.tensor(stays, device=self._device)], positions[live].T + step, self.cache)
            self.cache.fed()
