"""The native engine with heads (models.heads) that draft: several tokens of a row per pass, and the same tokens as without.

A pass feeds the row's newest token and the drafts after it. Every place's token is then sampled from the model's own distribution with the
place's own random number, exactly as without drafts; what was drafted counts as far as it is what was sampled. Drafts therefore decide how
many passes it takes and nothing else: greedy tokens are the greedy ones, and sampled ones those that the same seed gives anyway.

Medusa heads draft one token each; MTP drafts one token with its first block, whose keys and values have a cache of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from terrace.generation.cache import SharedPromptCache
from terrace.generation.interface import GroupReady, Heard, Prompt, Response, Sampling, uniforms
from terrace.generation.native import COMPACT_SHARE, NativeEngine, prompts_as_pack
from terrace.generation.sampling import sample_tokens
from terrace.models.batch import to_device
from terrace.models.families.registry import family_of_model, output_layer
from terrace.models.heads import mtp_hidden
from terrace.models.precision import DTYPES, compute_context
from terrace.models.shared_prompt import Unit, units_hidden


class DraftingEngine(NativeEngine):
    """`model` has heads. `acceptance` is the share of drafted tokens that were kept since the engine was opened."""

    drafted = 0
    accepted = 0

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    def generate(
        self, prompts: Iterable[Prompt], sampling: Sampling, ready: GroupReady | None = None, heard: Heard | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Response]]:  # fmt: skip
        """Waves of at most `max_rows` sequences, prompts in order: rows that are ahead by different numbers of tokens stay together."""
        prompts, per_wave = list(prompts), max(1, self._max_rows // sampling.samples)
        training = self._model.training
        self._model.eval()
        groups: list[list[Response]] = []
        try:
            with torch.no_grad(), compute_context(self._precision, str(self._device)):
                for start in range(0, len(prompts), per_wave):
                    if stop():
                        break

                    def group_ready(place: int, group: list[Response], start: int = start) -> None:
                        if ready is not None:
                            ready(start + place, group)

                    def token_heard(sequence: int, token: int, start: int = start) -> None:
                        if heard is not None:
                            heard(start + sequence // sampling.samples, sequence % sampling.samples, [token])

                    wave = prompts[start : start + per_wave]
                    groups += self._wave(wave, sampling, group_ready, token_heard if heard is not None else None)
        finally:
            self._model.train(training)
        return groups

    def _wave(
        self, prompts: Sequence[Prompt], sampling: Sampling, ready: GroupReady, heard: Callable[[int, int], None] | None = None
    ) -> list[list[Response]]:
        model, device, samples = self._model, self._device, sampling.samples
        heads = model.heads
        drafts_of_row = heads.count if heads.kind == "medusa" else 1
        most = drafts_of_row + 1
        batch = to_device(prompts_as_pack(prompts), device, DTYPES[self._precision])
        units = [Unit(start, len(prompt.input_ids)) for start, prompt in zip(batch.boundaries, prompts)]
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        hidden = units_hidden(model, batch, units, kept)
        cache = draft_cache(kept, units, samples)
        drafter = _Mtp(model, hidden, batch, units, samples) if heads.kind == "mtp" else None
        ends = torch.tensor([unit.end - 1 for unit in units], device=device)
        noise = np.stack([uniforms(sampling.seed, p, s, sampling.max_tokens) for p in prompts for s in range(samples)])
        noise = np.pad(noise, ((0, 0), (0, most)))
        wave = Wave(len(prompts), samples, sampling.max_tokens, ready)
        next_positions = torch.from_numpy(np.stack([prompt.next_positions for prompt in prompts])).to(device)  # [B, P]
        rows = torch.arange(len(prompts) * samples, device=device)  # the sequence that each row of the batch decodes
        live = np.ones(len(rows), bool)
        lengths = np.zeros(len(rows), np.int64)  # tokens so far, by row

        # The first token of every row comes from the prompt's last hidden state.
        source = hidden[ends].repeat_interleave(samples, dim=0)  # [A, H]: what the newest token was sampled from
        tokens, logprobs = self._sampled(output_layer(model)(source).float(), noise[:, :1], sampling)
        positions = batch.position_ids[:, 0, ends].repeat_interleave(samples, dim=1)  # [P, A] of `source`
        fed, counts = source[:, None], np.ones(len(rows), np.int64)
        while True:
            lengths, live = self._record(wave, rows.cpu().numpy(), live, lengths, tokens, logprobs, counts, sampling, heard)
            if not live.any():
                return wave.finish()
            if drafter is not None:
                drafter.take(fed, tokens, counts, positions)
            if live.mean() <= 1 - COMPACT_SHARE:
                keep = torch.from_numpy(np.flatnonzero(live)).to(device)
                rows, tokens, source = rows[keep], tokens[keep], source[keep]
                lengths, counts, live = lengths[live], counts[live], live[live]
                cache.keep_rows(keep.cpu().numpy())
                if drafter is not None:
                    drafter.keep_rows(keep)
            last = torch.from_numpy(np.maximum(counts, 1) - 1).to(device)
            newest = tokens.gather(1, last[:, None])  # [A, 1]
            drafts = self._drafts(source if drafter is None else drafter.hidden, drafter is not None, drafts_of_row)
            given = torch.cat([newest, drafts], dim=1)  # [A, n]
            begin = torch.from_numpy(np.maximum(lengths, 1) - 1).to(device)
            steps = begin[:, None] + torch.arange(most, device=device)  # [A, n]
            positions = (next_positions[rows // samples].T[:, :, None] + steps).flatten(1)  # [P, A * n]
            fed = self._run(given.flatten(), positions, cache).view(len(rows), most, -1)
            wanted = noise[rows.cpu().numpy()[:, None], np.maximum(lengths, 0)[:, None] + np.arange(most)]
            tokens, logprobs = self._sampled(output_layer(model)(fed.flatten(0, 1)).float(), wanted, sampling)
            agreed = (tokens[:, :-1] == drafts).long().cumprod(dim=1).sum(dim=1).cpu().numpy()
            self.drafted += int(live.sum()) * drafts_of_row
            self.accepted += int(agreed[live].sum())
            counts = np.where(live, agreed + 1, 0)
            cache.advance(counts)
            source = fed[torch.arange(len(rows), device=device), torch.from_numpy(np.maximum(counts, 1) - 1).to(device)]

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor, cache: SharedPromptCache) -> torch.Tensor:
        """Hidden states [A * n, H] of the tokens that were fed; positions [P, A * n]."""
        family = family_of_model(self._model)
        embeddings = family.language(self._model).embed_tokens(tokens.unsqueeze(0))
        return family.run_language(self._model, embeddings, positions.unsqueeze(1), {"decode": cache})

    def _sampled(self, logits: torch.Tensor, draws: np.ndarray, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and log-probabilities [A, n] from logits [A * n, V] and draws [A, n]."""
        uniform = torch.from_numpy(np.ascontiguousarray(draws)).to(self._device)
        tokens, logprobs = sample_tokens(logits, uniform.flatten(), self._forbidden, sampling)
        return tokens.view(draws.shape), logprobs.view(draws.shape)

    def _drafts(self, hidden: torch.Tensor, shared: bool, count: int) -> torch.Tensor:
        """int64 [A, count]: the most likely token of each head."""
        heads = self._model.heads
        layers = [output_layer(self._model)(hidden)] if shared else [
            layer(block(hidden)) for block, layer in zip(heads.blocks, heads.lm_heads)
        ]  # fmt: skip
        masked = [logits.index_fill(1, self._forbidden, float("-inf")) if len(self._forbidden) else logits for logits in layers[:count]]
        return torch.stack([logits.argmax(dim=1) for logits in masked], dim=1)

    def _record(
        self, wave: Wave, sequences: np.ndarray, live: np.ndarray, lengths: np.ndarray, tokens: torch.Tensor, logprobs: torch.Tensor,
        counts: np.ndarray, sampling: Sampling, heard: Callable[[int, int], None] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Note each row's first `counts` tokens, up to a stop token or the limit; the rows' lengths and which go on."""
        stops = torch.isin(tokens, self._stop).cpu().numpy()
        on_host, their_logprobs = tokens.cpu().numpy(), logprobs.cpu().numpy()
        live, lengths = live.copy(), lengths.copy()
        for place in range(tokens.shape[1]):
            now = live & (place < counts)
            if now.any():
                wave.record(sequences, now, on_host[:, place], their_logprobs[:, place], stops[:, place])
                if heard is not None:
                    for sequence, token in zip(sequences[now].tolist(), on_host[now, place].tolist()):
                        heard(sequence, token)
                lengths[now] += 1
                live &= ~(now & (stops[:, place] | (lengths >= sampling.max_tokens)))
        return lengths, live


class _Mtp:
    """The first MTP block while decoding: its cache, and `hidden` [A, H], from which the next draft is read."""

    def __init__(
        self, model: Any, hidden: torch.Tensor, batch: Any, units: list[Unit], samples: int
    ) -> None:
        self._model = model
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Rows of prompts see the token after them; the last row of each waits for the first token of the response.
        options = {"prompt_units": units, "keep": kept}
        mtp_hidden(model, 1, hidden, batch.input_ids[0].roll(-1), batch.position_ids, options)
        shorter = [Unit(unit.start, unit.prompt - 1) for unit in units]
        self._cache = draft_cache(kept, shorter, samples)
        self.hidden = hidden[:0]

    def take(self, fed: torch.Tensor, tokens: torch.Tensor, counts: np.ndarray, positions: torch.Tensor) -> None:
        """fed [A, n, H], the token sampled after each, [A, n], how many of them count, and the positions [P, A * n] of `fed`."""
        options = {"decode": self._cache}
        out = mtp_hidden(self._model, 1, fed.flatten(0, 1), tokens.flatten(), positions.unsqueeze(1), options)
        self._cache.advance(counts)
        last = torch.from_numpy(np.maximum(counts, 1) - 1).to(fed.device)
        self.hidden = out.view(*fed.shape)[torch.arange(len(fed), device=fed.device), last]

    def keep_rows(self, rows: torch.Tensor) -> None:
        self._cache.keep_rows(rows.cpu().numpy())
        self.hidden = self.hidden[rows]


def draft_cache(kept: dict[int, tuple[torch.Tensor, torch.Tensor]], units: list[Unit], samples: int) -> SharedPromptCache:
    """A cache in which `samples` rows of each of these prompts begin."""
    cache = SharedPromptCache(len(units) * samples)
    cache.add_prompts(range(len(units)), kept, units)
    cache.begin(np.arange(len(units) * samples), np.arange(len(units)).repeat(samples))
    return cache


class Wave:
    """The tokens of a wave's sequences as they come, on the host."""

    def __init__(self, prompts: int, samples: int, max_tokens: int, ready: GroupReady) -> None:
        self._samples, self._ready = samples, ready
        self._tokens = np.zeros((prompts * samples, max_tokens), np.int32)
        self._logprobs = np.zeros((prompts * samples, max_tokens), np.float32)
        self._lengths = np.zeros(prompts * samples, np.int64)
        self._stopped = np.zeros(prompts * samples, bool)
        self._groups: dict[int, list[Response]] = {}
        self._prompts = prompts

    def record(
        self, rows: np.ndarray, live: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, stopped: np.ndarray
    ) -> None:
        sequences = rows[live]
        places = self._lengths[sequences]
        self._tokens[sequences, places] = tokens[live]
        self._logprobs[sequences, places] = logprobs[live]
        self._lengths[sequences] += 1
        self._stopped[sequences] = stopped[live]
        for group in np.unique(sequences[stopped[live]] // self._samples).tolist():
            members = slice(group * self._samples, (group + 1) * self._samples)
            if self._stopped[members].all():
                self._complete(group)

    def _complete(self, group: int) -> None:
        first = group * self._samples
        self._groups[group] = [
            Response(self._tokens[s, : self._lengths[s]].copy(), self._logprobs[s, : self._lengths[s]].copy(),
                     bool(self._stopped[s]))
            for s in range(first, first + self._samples)
        ]  # fmt: skip
        self._ready(group, self._groups[group])

    def finish(self) -> list[list[Response]]:
        for group in range(self._prompts):
            if group not in self._groups:
                self._complete(group)
        return [self._groups[group] for group in range(self._prompts)]
