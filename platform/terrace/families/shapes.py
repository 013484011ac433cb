"""A model's shape as the planner counts it: parameters, matrix products and widths per part. Plain numbers, made by a family.

Letters: H width of the language model, W width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


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
    smaller: int = 0  # parameters that blocks lack together where they are not equal
    idle_blocks: int = 0  # blocks whose output nobody takes: they run forward only
    tile_patches: int | None = None  # of a picture at most, where an image is cut into tiles; None: the tower sees an image whole
    outer_norms: int = 0  # norms over patches outside of the blocks
    padded: bool = False  # patches are embedded for a rectangle around each picture that holds the largest of the pack
    kept_inner: int = 3  # tensors of the feed-forward's width that its backward needs; 2 where its activation is one fused function
    merged_blocks: int = 0  # of the blocks, those behind a merger inside the tower, with one row for `merged_patches` patches
    merged_patches: int = 1
    merger_products: int = 0  # that merger's multiply-adds per patch, and how many keys a patch's attention sees in it
    merger_keys: int = 0
    adapter_products: int = 0  # multiply-adds per row of a block, in adapters that are the model's own
    tokens_per_picture: int = 0  # where they are the same for pictures of any size, which are then padded to the largest of the pack
    mask_keys: float = 0.0  # numbers per patch of a mask over the keys of a picture, which all blocks are given

    @property
    def whole_blocks(self) -> float:
        """Blocks that train, counted by the rows they see."""
        return self.depth - self.idle_blocks - self.merged_blocks * (1 - 1 / self.merged_patches)

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
    outer: int = 0  # of `products`, those with what the tower gives: no gradient flows back through them where it is frozen
    unused_parameters: int = 0  # of those, what never gets a gradient
    patch_products: int = 0  # further multiply-adds, per patch; those of them with what the tower gives are `patch_outer`
    patch_outer: int = 0
    once: int = 0  # further multiply-adds of a pass, whatever it sees
    in_place: int = 0  # multiply-adds per visual token in its own matrices that stand in place of the language model's
    first: bool = False  # it reads pixels, which need no gradient
    text_products: int = 0  # multiply-adds per token of the text, in layers of the projector that stand between those of the language model
    text_kept: int = 0  # numbers per token that autograd keeps there
    enters: int = 0  # layers of the language model in front of the first such layer: no gradient of what trains before them reaches them

    def plus(self, parameters: int, in_place: int) -> ProjectorShape:
        """With parameters that run in place of the language model's own, for visual tokens, and so add no work."""
        return replace(self, parameters=self.parameters + parameters, in_place=in_place) if parameters else self


@dataclass(frozen=True)
class ExpertsShape:
    """Sparse layers, all but `dense_layers` of them: each token goes to `per_token` of `count` experts, and through what all share."""

    count: int
    per_token: int
    intermediate: int  # width inside one expert
    shared: int = 0  # width inside what every token goes through beside them
    dense_layers: int = 0  # layers with the usual feed-forward
    biases: int = 0  # numbers of a layer's router beside its matrix, which no gradient changes

    @property
    def active(self) -> int:
        """Width inside the feed-forward that a token meets."""
        return self.per_token * self.intermediate + self.shared


@dataclass(frozen=True)
class LatentShape:
    """Queries, keys and values that are written through a narrow vector (MLA). Ranks are its widths; the rest are widths of a head."""

    query_rank: int  # 0: queries are written directly
    key_rank: int
    plain: int  # of queries and keys, without position
    rotary: int  # with position
    value: int


def encoder_block(width: int, inner: int) -> int:
    """Parameters of a plain encoder layer: four projections, two layers of a feed-forward, two LayerNorms, biases everywhere."""
    return 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width


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
    scaled_heads: bool = False  # LayerNorm over each query and key head, with a scale and a shift for every number
    norms: int = 2  # of a layer, over its whole width
    gated: bool = True  # SwiGLU and RMSNorms; otherwise two matrices with one activation between them, and LayerNorms
    layer_biases: int = 0  # parameters of a layer beside those above
    other_biases: int = 0  # of the final norm, likewise, and learned positions
    rotary: bool = True  # positions turn queries and keys; else they are learned and added
    experts: ExpertsShape | None = None
    latent: LatentShape | None = None
    adapter_products: int = 0  # multiply-adds per token of a layer, in adapters that are the model's own
    head_products: int = 0  # multiply-adds per supervised token in front of the output layer
    masked: bool = False  # attention with a mask over each sample, which keeps keys and values as few as they are

    def with_latent(self, latent: LatentShape, experts: ExpertsShape) -> LanguageShape:
        size = latent.plain + latent.rotary
        return replace(self, latent=latent, experts=experts, head_size=size, key_heads=self.heads)

    @property
    def feed_forward_matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def value_width(self) -> int:
        """Width of all heads' values side by side."""
        return self.heads * (self.latent.value if self.latent else self.head_size)

    @property
    def attention_matrices(self) -> int:
        """Multiply-adds per token in the projections of attention, and their parameters."""
        if self.latent is None:
            return self.width * (2 * self.query_width + 2 * self.key_width)
        latent = self.latent
        query = (self.width + self.query_width) * latent.query_rank if latent.query_rank else self.width * self.query_width
        key = self.width * (latent.key_rank + latent.rotary) + latent.key_rank * self.heads * (latent.plain + latent.value)
        return query + key + self.value_width * self.width

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_size

    @property
    def sparse_layers(self) -> int:
        return self.layers - self.experts.dense_layers if self.experts else 0

    @property
    def mean_intermediate(self) -> float:
        """Width inside the feed-forward that a token meets, over all layers."""
        if self.experts is None:
            return self.intermediate
        return (self.experts.dense_layers * self.intermediate + self.sparse_layers * self.experts.active) / self.layers

    @property
    def router_width(self) -> float:
        """Experts that a token's hidden state is compared with, over all layers."""
        return self.sparse_layers * self.experts.count / self.layers if self.experts else 0.0


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
    layers=0, width=0, intermediate=0, heads=0, key_heads=0, head_size=0, vocabulary=0, tied=True, attention_biases=False
)  # of an encoder of pictures alone


NO_VISION = VisionShape(
    depth=0, width=0, intermediate=0, heads=1, gated=False, window=None, full_blocks=0, patch_values=0, patches_per_token=1.0,
    block_parameters=0, other_parameters=0,
)  # of an encoder of texts alone


@dataclass(frozen=True)
class ModelShape:
    vision: VisionShape
    projector: ProjectorShape
    language: LanguageShape
    adapters: Mapping[str, AdapterShape] = field(default_factory=dict)  # part -> those that a stage trains in its place
    partly: Mapping[str, int] = field(default_factory=dict)  # part -> parameters that a stage trains, where it trains only some

    def adapters_of(self, part: str) -> AdapterShape:
        return self.adapters.get(part, NO_ADAPTERS)
