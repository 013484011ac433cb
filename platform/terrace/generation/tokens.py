"""Which tokens a model may never say, and which end its answer."""

from __future__ import annotations

from typing import Any

from terrace.data.tokenizer import TextTokenizer


def forbidden_tokens(tokenizer: TextTokenizer, config: Any) -> tuple[int, ...]:
    """Ids that are never sampled: media tokens and marks that open a turn, and ids that the tokenizer does not have."""
    special = tokenizer.special
    media = {special.image_pad, special.video_pad, special.vision_start, special.vision_end, special.im_start}
    unknown = range(tokenizer.vocabulary_size, config.text_config.vocab_size)
    return tuple(sorted(media | set(unknown)))


def stop_tokens(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The end of the turn, and the end of text."""
    return tokenizer.special.im_end, tokenizer.special.endoftext
