"""A model's shape as the planner counts it: parameters, matrix products and widths per part. Plain numbers, made by a family.

Letters: H width of the language model, W width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class VisionShape:
    """`gated` and `window` tell Qwen2.5-VL's tower (SwiGLU, RMSNorm, windows) from others (GELU, LayerNorm, none)."""

    depth: int
    width: int
    intermediate: int
    heads: int
    gated: bool
    window: int | None  # patches along a window's side; None: every block sees the whole picture
    full_blocks: int  # blocks that see the whole picture
    patch_values: int  # numbers that the patch embedding reads of one patch
    patches_per_token: float  # patches of one visual token
    block_parameters: int
    other_parameters: int  # embeddings and norms outside the blocks
    extra_tokens: int = 0  # per picture, beside its patches (a class token)
    unused_parameters: int = 0  # of those above, what never gets a gradient
    idle_blocks: int = 0  # blocks whose output nobody takes: they run forward only

    @property
    def head_size(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class ProjectorShape:
    """Numbers per visual token: `products` multiply-adds, `inner` width between its layers, `times` it runs."""

    parameters: int
    products: int
    inner: int
    times: int = 1
    unused_parameters: int = 0  # of those, what never gets a gradient


@dataclass(frozen=True)
class LanguageShape:
    layers: int
    width: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool  # input and output embeddings are one matrix
    attention_biases: bool  # on query, key and value
    head_norms: bool = False  # RMSNorm over each query and key head
    gated: bool = True  # three matrices of a feed-forward layer, or two
    layer_parameters: int | None = None  # of a layer that is not attention and a gated feed-forward without biases, with two RMSNorms
    other_parameters: int = 0  # beside layers, embeddings of tokens and the weight of the final norm

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_size


@dataclass(frozen=True)
class AdapterShape:
    """Low-rank adapters of a part, all of its layers together."""

    parameters: int
    ranks: int  # numbers per token between A and B
    dropped: int = 0  # numbers per token that go through dropout

    def plus(self, other: AdapterShape) -> AdapterShape:
        return AdapterShape(self.parameters + other.parameters, self.ranks + other.ranks, self.dropped + other.dropped)


NO_ADAPTERS = AdapterShape(0, 0)


NO_LANGUAGE = LanguageShape(
    layers=0, width=0, intermediate=0, heads=0, key_heads=0, head_size=0, vocabulary=0, tied=True, attention_biases=False,
    layer_parameters=0,
)  # of an encoder of pictures alone


@dataclass(frozen=True)
class ModelShape:
    vision: VisionShape
    projector: ProjectorShape
    language: LanguageShape
    adapters: Mapping[str, AdapterShape] = field(default_factory=dict)  # part -> those that a stage trains in its place

    def adapters_of(self, part: str) -> AdapterShape:
        return self.adapters.get(part, NO_ADAPTERS)
