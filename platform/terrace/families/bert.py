"""BERT: WordPiece text between [CLS] and [SEP], learned positions, and a layer behind the blocks that fills masked tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from terrace.families.text_encoder import TextEncoder


@dataclass(frozen=True)
class Bert(TextEncoder):
    """`BertForMaskedLM`. Every token is of the first type: there is no prediction of the next sentence."""

    name: ClassVar[str] = "bert"
    marks: ClassVar[Mapping[str, str]] = {"pad": "[PAD]", "start": "[CLS]", "end_of_text": "[SEP]", "mask": "[MASK]"}


FAMILY = Bert
