"""Answers of lengths that are drawn beforehand, the same for everybody who is compared: a random model ends where it likes."""

from __future__ import annotations

from typing import Any

import numpy as np


def drawn(kind: str, prompts: int, samples: int, tokens: int, seed: int = 0) -> np.ndarray:
    """int64 [prompts, samples], 1 to `tokens`: all of them (`full`), or log-normal with sigma 1 and a median of an eighth of `tokens`
    (`tail`: one answer in 50 is cut)."""
    if kind == "full":
        return np.full((prompts, samples), tokens, np.int64)
    logs = np.log(tokens / 8) + np.random.default_rng(seed).standard_normal((prompts, samples))
    return np.clip(np.exp(logs).round().astype(np.int64), 1, tokens)


def impose_on_terrace(lengths: np.ndarray, per_call: int | None) -> None:
    """The `native` engine's answers to its n-th prompt get these lengths. `per_call`: prompts that each call of `generate` moves on by;
    None: every call begins at the first again."""
    from terrace.generation import native

    calls = [0]

    class Imposed(native.Sequences):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self._first = calls[0]
            calls[0] += per_call or 0

        def record(self, rows: np.ndarray, tokens: Any, logprobs: Any, stopped: Any, version: int) -> np.ndarray:
            places = (self._first + self.number_of_row[rows]) % len(lengths)
            wanted = lengths[places, self._sample_of_row[rows]]
            return super().record(rows, tokens, logprobs, self._lengths[rows] + 1 >= wanted, version)

    native.Sequences = Imposed


def impose_on_transformers(model: Any, lengths: np.ndarray, end: int, first: int = 0) -> None:
    """The same for `model.generate`, each call of which answers whole groups: the token `end` is forbidden and then forced."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class Force(LogitsProcessor):
        def __init__(self, wanted: torch.Tensor, prompt: int) -> None:
            self._wanted, self._prompt = wanted, prompt

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ends = self._wanted <= input_ids.shape[1] - self._prompt + 1
            scores[:, end] = float("-inf")
            scores[ends] = float("-inf")
            scores[ends, end] = 0.0
            return scores

    plain, done = model.generate, [first]

    def generate(*arguments: Any, **keywords: Any) -> Any:
        ids = keywords["input_ids"]
        count = len(ids) // lengths.shape[1]
        places = np.arange(done[0], done[0] + count) % len(lengths)
        done[0] += count
        wanted = torch.from_numpy(lengths[places].ravel()).to(ids.device)
        return plain(*arguments, logits_processor=LogitsProcessorList([Force(wanted, ids.shape[1])]), **keywords)

    model.generate = generate
