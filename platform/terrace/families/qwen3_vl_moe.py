"""Qwen3-VL with a mixture of experts: the same images, positions and conversation; sparse layers in the language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from terrace.families.checks import complete
from terrace.families.interface import Finding
from terrace.families.qwen3_vl import Qwen3VL
from terrace.families.shapes import ExpertsShape, ModelShape

BALANCE = 0.001  # transformers' default of `router_aux_loss_coef`, and the published models'


class Qwen3VLMoe(Qwen3VL):
    name: ClassVar[str] = "qwen3_vl_moe"
    experts: ClassVar[bool] = True

    @classmethod
    def balance_weight(cls, config: Mapping[str, Any]) -> float:
        return float((config.get("text_config") or {}).get("router_aux_loss_coef", BALANCE))

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        shape, text = super().shape(config, vocabulary), config["text_config"]
        experts = ExpertsShape(
            _experts(text), text["num_experts_per_tok"], text["moe_intermediate_size"], dense_layers=_dense_layers(text)
        )
        return dataclasses.replace(shape, language=dataclasses.replace(shape.language, experts=experts))

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from super().check(config, trained_tokenizer)
        text, at = config.get("text_config"), ("text_config",)
        if not isinstance(text, dict):
            return
        written = {**text, "num_experts": _experts(text)}
        if not (yield from complete(written, ("num_experts", "num_experts_per_tok", "moe_intermediate_size"), at)):
            return
        if written["num_experts_per_tok"] > written["num_experts"]:
            yield (*at, "num_experts_per_tok"), f"{text['num_experts_per_tok']} is more than num_experts {written['num_experts']}"


def _experts(text: Mapping[str, Any]) -> Any:
    """Published as `num_experts`; transformers 5 writes the same as `num_local_experts`."""
    return text.get("num_experts") or text.get("num_local_experts")


def _dense_layers(text: Mapping[str, Any]) -> int:
    """Layers without experts, by transformers' rule."""
    step, plain = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers") or ()
    return sum(number in plain or (number + 1) % step != 0 for number in range(text["num_hidden_layers"]))


FAMILY = Qwen3VLMoe
