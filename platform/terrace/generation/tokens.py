"""Which tokens a model may never say, and which end its answer."""

from __future__ import annotations

from typing import Any

from terrace.data.tokenizer import TextTokenizer
from terrace.families.configurations import language_config
from terrace.families.registry import family_class


def forbidden_tokens(tokenizer: TextTokenizer, config: Any) -> tuple[int, ...]:
    """Ids that are never sampled: media tokens and marks that open a turn, and ids that the tokenizer does not have."""
    family = family_class(config.model_type)
    vocabulary = language_config(config).vocab_size
    media = {number for role in family.never if (number := tokenizer.marks(family)[role]) < vocabulary}  # others have no logit
    unknown = range(tokenizer.vocabulary_size, vocabulary)
    return tuple(sorted(media | set(unknown) | family.unsaid(config)))


def stop_tokens(tokenizer: TextTokenizer, config: Any) -> tuple[int, ...]:
    """The end of the turn, and the end of text."""
    family = family_class(config.model_type)
    marks = tokenizer.marks(family)
    return tuple(dict.fromkeys((marks[family.end_of_turn], marks[family.end_of_text])))
