"""RoBERTa: BERT's blocks under byte-level text between <s> and </s>; positions count on from behind that of the padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from terrace.families.text_encoder import TextEncoder


@dataclass(frozen=True)
class Roberta(TextEncoder):
    """`RobertaForMaskedLM`."""

    name: ClassVar[str] = "roberta"
    marks: ClassVar[Mapping[str, str]] = {"start": "<s>", "pad": "<pad>", "end_of_text": "</s>", "mask": "<mask>"}
    passed_positions: ClassVar[bool] = True

    @classmethod
    def completed(cls, config: Mapping[str, Any], token_id: Any, size: int) -> dict[str, Any]:
        return {"type_vocab_size": 1} | super().completed(config, token_id, size)


FAMILY = Roberta
