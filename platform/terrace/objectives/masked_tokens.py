"""Which tokens of a pack are to be told, and what the model reads in their places: drawn from (stage seed, source, sample, epoch).

Numpy alone, sample by sample: packs, workers and restarts change nothing. A sample of which two pieces stand in one stage (a document
that was cut up) has its draws from the piece's own tokens as well.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from terrace.data.order.permutation import generator_of
from terrace.data.tokenizer import TextTokenizer
from terrace.data.types import PackedExample
from terrace.errors import InputError
from terrace.families.interface import Family
from terrace.recipe.schema_mlm import MlmOptions

NO_TARGET = -100
HELD_OUT = -1  # the epoch of held-out samples: the same tokens at every evaluation


@dataclass(frozen=True)
class Masking:
    """What a stage masks with: its options and what they need of the tokenizer."""

    options: MlmOptions
    seed: int
    mask: int  # id of the mask
    special: np.ndarray  # bool [V]: never chosen, and never put in another's place
    ordinary: np.ndarray  # int32: all other ids
    begins: np.ndarray | None  # bool [V]: begins a word; None: single tokens are chosen

    @classmethod
    def of(cls, options: MlmOptions, seed: int, tokenizer: TextTokenizer, family: Family) -> Masking:
        """Raises InputError for whole words where the tokenizer does not say where one begins."""
        special = np.zeros(tokenizer.vocabulary_size, bool)
        marks = tokenizer.marks(family)
        special[[*tokenizer.special_ids(), *marks.values()]] = True
        begins = tokenizer.begins_words() if options.whole_words else None
        if options.whole_words and begins is None:
            raise InputError(
                f"mlm.whole_words: the tokens of {tokenizer.directory} do not say where a word begins (## or a blank); leave it out"
            )
        begins_array = None if begins is None else np.asarray(begins, bool)
        return cls(options, seed, marks["mask"], special, np.flatnonzero(~special).astype(np.int32), begins_array)

    def pack(self, example: PackedExample) -> PackedExample:
        """The pack as the model reads it; its targets are the chosen tokens in their own places."""
        ids, targets = example.input_ids.copy(), np.full(example.tokens, NO_TARGET, np.int32)
        epochs = example.epochs.tolist() or [HELD_OUT] * len(example.sample_ids)
        start = 0
        for end, source, sample, epoch in zip(example.segment_ends.tolist(), example.sources, example.sample_ids, epochs, strict=True):
            tokens = example.input_ids[start:end]
            piece = zlib.crc32(np.ascontiguousarray(tokens).tobytes())
            generator = generator_of(self.seed, source, sample, epoch, f"masked tokens {piece}")
            chosen = self.chosen(tokens, generator)
            targets[start + chosen] = tokens[chosen]
            ids[start + chosen] = self._read_as(tokens[chosen], generator)
            start = end
        return replace(example, input_ids=ids, targets=targets)

    def chosen(self, tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """int64, ascending: places of the tokens that are to be told, `share` of those that are no marks, rounded, at least one."""
        places = np.flatnonzero(~self.special[tokens])
        wanted = max(1, round(self.options.share * len(places)))
        if self.begins is None:
            return np.sort(generator.permutation(places)[:wanted])
        apart = np.diff(places, prepend=-2) > 1  # behind a mark, or the first
        words = np.split(places, np.flatnonzero((self.begins[tokens[places]] | apart)[1:]) + 1)
        taken: list[np.ndarray] = []
        room = wanted
        for number in generator.permutation(len(words)):
            if len(words[number]) <= room:
                taken.append(words[number])
                room -= len(words[number])
        if not taken and len(places):  # every word is longer than the share: the shortest one
            taken = [min(words, key=len)]
        return np.sort(np.concatenate(taken)) if taken else places[:0]

    def _read_as(self, tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """What stands for each chosen token: the mask, any other token, or itself."""
        fate, others = generator.random(len(tokens)), self.ordinary[generator.integers(0, len(self.ordinary), len(tokens))]
        replaced = self.options.masked + self.options.replaced
        return np.where(fate < self.options.masked, self.mask, np.where(fate < replaced, others, tokens)).astype(np.int32)
