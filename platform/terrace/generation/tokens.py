"""Which tokens a model may never say, and which end its answer."""

from __future__ import annotations

from typing import Any

from terrace.data.tokenizer import TextTokenizer
from terrace.families.configurations import language_config
from terrace.families.registry import family_class


def forbidden_tokens(tokenizer: TextTokenizer, config: Any) -> tuple[int, ...]:
    """Ids that are never sampled: media tokens and marks that open a turn, and ids that the tokenizer does not have."""
    family = family_class(config.model_type)
    media = {tokenizer.marks(family)[role] for role in family.never}
    unknown = range(tokenizer.vocabulary_size, language_config(config).vocab_size)
    return tuple(sorted(media | set(unknown) | family.unsaid(config)))


def stop_tokens(tokenizer: TextTokenizer, config: Any) -> tuple[int, ...]:
    """The end of the turn, and the end of text."""
    family = family_class(config.model_type)
    marks = tokenizer.marks(family)
    return tuple(dict.fromkeys((marks[family.end_of_turn], marks[family.end_of_text])))
