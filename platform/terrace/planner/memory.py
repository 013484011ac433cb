"""Memory of one GPU in a training step: weights, gradients, optimizer, activations, logits and buffers, for every strategy.

Bytes per parameter follow from where a strategy keeps what (`_state`). Activations follow from what autograd saves in each
block, tensor by tensor (`_language_layer`, `_vision_block`): a part that trains also keeps the inputs of its matrix products; a
frozen part through which gradients pass keeps the rest; a part that nothing before trains keeps nothing. With activation
checkpointing only the input of each block stays, plus one block being recomputed. The pack is the worst one the stage
allows: full, and as many visual tokens as may be in it.

`ddp` computes under autocast: weights, residual stream and norms are float32, and the matrices have copies in the stage's
precision until backward. The sharded strategies hold or gather weights in the stage's precision.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import gcd

from terrace.families.shapes import ModelShape
from terrace.planner.experts import exchange_buffers, experts_elsewhere
from terrace.planner.parameters import head_parameters, part_sizes, trainable_counts, trains_whole
from terrace.planner.second_models import second_model_bytes
from terrace.planner.views import kept_pictures, teacher_parameters
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import PARTS, PartName, Stage

FP32 = 4
MOMENTS = 8  # two float32 moments of AdamW
MOMENTUM = 4  # one, of SGD and Muon
DEEPSPEED_BUCKET = 5e8  # elements of DeepSpeed's reduce and gather buckets
MAX_LIVE = 1e9  # parameters that ZeRO-3 keeps gathered at a time
RING_TILE_NUMBERS = 64 * 2**20  # scores of a tile of ring attention, at most (models.ring_attention)
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step. `host` is what offloading moves to the machine's memory instead."""

    weights: float
    gradients: float
    optimizer: float
    vision_activations: float
    language_activations: float
    working: float  # what the step's fullest moment (a block in backward, gradients under way) holds beyond the rest
    logits: float
    buffers: float  # copies in compute precision, gathered layers, communication buckets, the output layer's gradient
    host: float = 0.0

    @property
    def activations(self) -> float:
        return self.vision_activations + self.language_activations + self.working

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


@dataclass(frozen=True)
class PackSize:
    """The pack that memory is planned for: tokens, of which visual, and rows that meet the output layer."""

    tokens: float
    visual_tokens: float
    supervised_tokens: float


def worst_pack(stage: Stage, has_images: bool) -> PackSize:
    """The largest pack: full, visual tokens up to the stage's bound, all other tokens supervised. One of a fixed number of
    samples: as many texts of full length and pictures, which meet no output layer."""
    if OBJECTIVES[stage.objective].fixed_packs:
        return PackSize(stage.batch.samples_per_pack * stage.sequence_length, stage.batch.samples_per_pack, 0)
    length = stage.sequence_length / stage.parallel.sequence_parallel
    limit = stage.data_loading.max_visual_tokens_per_pack or stage.sequence_length
    visual = min(limit, stage.sequence_length) / stage.parallel.sequence_parallel if has_images else 1
    return PackSize(length, visual, length)


def stage_memory(shape: ModelShape, stage: Stage, workers: int, pack: PackSize, on_gpu: bool = True) -> Memory:
    """Peak memory per GPU of `stage` on `workers` workers with one pack at a time."""
    compute = COMPUTE_BYTES[stage.precision]
    state = _state(shape, stage, workers, compute, on_gpu)
    if stage.view_options is not None:
        pack = replace(pack, visual_tokens=pack.visual_tokens * kept_pictures(stage, shape))
    vision = _vision_activations(shape, stage, pack, compute, on_gpu)
    language = _language_activations(shape, stage, pack, compute, on_gpu)
    logits = min(stage.loss_chunk_tokens, pack.supervised_tokens) * shape.language.vocabulary * 2 * FP32
    kept = [vision.kept, language.kept]
    host = state.host
    if stage.activation_offload:
        host += sum(kept)
        kept = [0.0, 0.0]
    head = _head_buffers(shape, stage, compute, pack)
    # The fullest moment: at the output layer everything is kept; a block in backward works on its own; when vision's turn has
    # come, what the language blocks kept is gone, and nearly all gradients are there.
    at_head = sum(kept) + logits + head + _under_way(shape, stage, state, 0.0)
    in_language = sum(kept) + language.working + _ring_buffers(shape, stage, pack) + _under_way(shape, stage, state, 0.0)
    in_language += exchange_buffers(shape, stage, pack.tokens, compute)
    in_vision = kept[0] + vision.working + _under_way(shape, stage, state, 1.0)
    fullest = max(at_head, in_language, in_vision)
    beside = FP32 * teacher_parameters(shape, stage) + second_model_bytes(shape, stage, _shards(stage, workers), compute)
    return Memory(
        weights=state.weights + beside,
        gradients=state.gradients,
        optimizer=state.optimizer,
        vision_activations=kept[0],
        language_activations=kept[1],
        working=fullest - sum(kept) - logits - head,
        logits=logits,
        buffers=state.buffers + head,
        host=host,
    )


def _ring_buffers(shape: ModelShape, stage: Stage, pack: PackSize) -> float:
    """What a layer of ring attention takes while it runs backward: two tiles of scores, keys and values of three ranks with the
    gradients of two, and the gradients of its own queries and of what it gave; all but what is passed on in float32."""
    if stage.parallel.sequence_parallel == 1 or stage.parallel.sequence_exchange != "ring":
        return 0.0
    language, compute = shape.language, COMPUTE_BYTES[stage.precision]
    tile = min(RING_TILE_NUMBERS, language.heads * pack.tokens * min(pack.tokens, 4096))
    sent = language.key_width + language.key_width * language.value_width / language.query_width
    return FP32 * 2 * tile + pack.tokens * (sent * (3 * compute + 2 * FP32) + FP32 * (language.query_width + language.value_width))


# ---------------------------------------------------------------- parameters


@dataclass(frozen=True)
class _State:
    weights: float
    gradients: float
    optimizer: float
    buffers: float
    host: float
    waiting: float = 0.0  # whole gradients that wait in a bucket to be reduced, at most; 0 where `gradients` has them


def _under_way(shape: ModelShape, stage: Stage, state: _State, language_share: float) -> float:
    """Gradients beyond `gradients` when the output layer's and a share of the language blocks' are there."""
    if not trains_whole(stage, "language"):
        return 0.0
    head = FP32 * shape.language.vocabulary * shape.language.width
    so_far = head + language_share * (FP32 * part_sizes(shape)["language"].total - head)
    return max(0.0, min(state.waiting, so_far) - state.gradients)


def _state(shape: ModelShape, stage: Stage, workers: int, compute: int, on_gpu: bool) -> _State:
    """Bytes of weights, gradients and optimizer per GPU, and of what the strategy needs to work on them."""
    sizes = part_sizes(shape)
    everything = sum(size.total + shape.adapters_of(part).parameters for part, size in sizes.items())
    heads = head_parameters(shape, stage)
    everything += heads
    trained = sum(trainable_counts(shape, stage).values()) + heads
    largest_block = max(size.block for size in sizes.values())
    outer = shape.language.vocabulary * shape.language.width * (1 if shape.language.tied else 2)
    parallel, shards, states = stage.parallel, workers, optimizer_bytes(shape, stage)
    strategy = parallel.strategy
    buffers = waiting = 0.0
    if strategy == "ddp":
        elsewhere = experts_elsewhere(shape, stage)
        untrained = elsewhere if trains_whole(stage, "language") else 0  # of them, what this worker has no gradients for
        weights, gradients = FP32 * (everything - elsewhere), FP32 * (trained - untrained)
        # Each matrix's momentum under Muon is kept by the worker that steps it.
        optimizer = (states - (1 - 1 / workers) * muon_bytes(shape, stage)) * (trained - untrained) / max(1, trained)
        if compute < FP32:  # autocast's copies of every matrix that gradients pass through
            buffers = compute * matrices_in_backward(shape, stage)
    elif strategy == "fsdp":
        shards = _shards(stage, workers)
        weights, optimizer = FP32 * everything / shards, states / shards
        whole = accumulates(stage, workers) and not parallel.reduce_every_pack  # on every rank until the last pack of a step
        gradients = FP32 * trained / (1 if whole else shards)
        if workers > 1:  # two blocks gathered (one ahead), the embeddings, one block's gradient being reduced
            gathered = 2 * largest_block if parallel.reshard_after_forward else everything - outer
            buffers = compute * (gathered + outer) + FP32 * largest_block
    else:
        bucket = min(DEEPSPEED_BUCKET, trained)
        weights = compute * everything / (shards if strategy == "zero3" else 1)
        gradients = FP32 * trained / (1 if strategy == "zero1" else shards)
        optimizer = (FP32 * trained + states) / shards  # a float32 master copy and the moments
        if strategy == "zero3":  # one bucket in the precision of the reduction, there from the start
            buffers = FP32 * bucket + (compute * min(MAX_LIVE, everything) if workers > 1 else 0)
        elif strategy == "zero1" and stage.precision == "bf16":
            gradients += compute * trained  # its bf16 optimizer keeps those of backward beside the float32 sums; no bucket
        elif workers > 1 and on_gpu:  # two buckets, so that one is reduced while the other fills
            buffers = compute * 2 * bucket
        elif workers > 1:  # one, made for each step, of which only what is filled takes memory
            waiting = compute * bucket
    host = 0.0
    if strategy.startswith("zero") and compute < FP32:
        host = FP32 * (everything - trained) / shards  # frozen weights in full precision, for exports: each rank its share
    if parallel.offload_optimizer != "none":
        host, optimizer = host + optimizer + gradients, 0.0
        gradients = 0.0 if strategy in ("zero2", "zero3") else gradients
    if parallel.offload_parameters != "none":
        host, weights = host + weights, 0.0
    return _State(weights, gradients, optimizer, buffers, host, waiting)


def _shards(stage: Stage, workers: int) -> int:
    """The workers that a sharded model is divided by."""
    return gcd(stage.parallel.hybrid_shard_size or workers, workers)


def accumulates(stage: Stage, workers: int) -> bool:
    """Whether a worker has several packs in a step."""
    return stage.batch.packs * stage.parallel.sequence_parallel > workers


def optimizer_bytes(shape: ModelShape, stage: Stage) -> float:
    """Bytes of the optimizer's state over all workers, and of the average of weights where the stage keeps one."""
    language, options = shape.language, stage.optimizer
    numbers = sum(trainable_counts(shape, stage).values()) + head_parameters(shape, stage)
    if options.kind in ("sgd", "lars"):
        states = MOMENTUM * numbers if options.momentum else 0.0
    elif options.kind == "adafactor":  # a float32 sum per row and per column; matrices are about as wide as the model
        states = 2 * FP32 * numbers / language.width
    elif options.kind == "muon":
        matrices = muon_bytes(shape, stage)
        states = matrices + MOMENTS * (numbers - matrices / MOMENTUM)
    else:
        states = MOMENTS * numbers
    return states + (FP32 * numbers if stage.ema is not None else 0.0)


def muon_bytes(shape: ModelShape, stage: Stage) -> float:
    """Bytes of Muon's momentum over all workers: everything trained but embeddings and output layer. 0 under other optimizers."""
    if stage.optimizer.kind != "muon":
        return 0.0
    language = shape.language
    outer = language.vocabulary * language.width * (1 if language.tied else 2) if trains_whole(stage, "language") else 0
    return MOMENTUM * (sum(trainable_counts(shape, stage).values()) + head_parameters(shape, stage) - outer)


def gradients_reach(stage: Stage, part: PartName) -> bool:
    """Whether gradients pass through a part: it trains, or something before it does."""
    return any(getattr(stage.train, before) is not None for before in PARTS[: PARTS.index(part) + 1])


def matrices_in_backward(shape: ModelShape, stage: Stage) -> float:
    """Parameters of the blocks and the projector that gradients pass through; embeddings and output layer are apart."""
    sizes = part_sizes(shape)
    return sum(
        sizes[part].in_blocks - (experts_elsewhere(shape, stage) if part == "language" else 0)
        for part in PARTS
        if gradients_reach(stage, part) and not (getattr(stage.train, part) is None and stage.frozen_activation_checkpointing)
    )


def _head_buffers(shape: ModelShape, stage: Stage, compute: int, pack: PackSize) -> float:
    """The output layer's matrix in compute precision, its running float32 gradient and one product added to it."""
    if not pack.supervised_tokens:
        return 0.0
    matrix = shape.language.vocabulary * shape.language.width
    copies = compute * matrix if compute < FP32 and stage.parallel.strategy == "ddp" else 0
    if trains_whole(stage, "language"):
        copies += FP32 * matrix + compute * matrix
    return copies + FP32 * pack.supervised_tokens * shape.language.width


# ---------------------------------------------------------------- activations


@dataclass(frozen=True)
class _Activations:
    kept: float  # from forward until backward, over all blocks
    working: float  # one block at work


def _language_activations(shape: ModelShape, stage: Stage, pack: PackSize, compute: int, on_gpu: bool) -> _Activations:
    language, train = shape.language, stage.train.language
    residual = FP32 if stage.parallel.strategy == "ddp" else compute
    layer = _language_layer(shape, stage, compute, on_gpu) + _adapter_values(shape, "language", compute) / max(1, language.layers)
    layer += _own_inputs(shape, stage, pack, on_gpu) * compute
    working = pack.tokens * (3 * language.mean_intermediate * compute + 2 * language.width * residual)
    if not gradients_reach(stage, "language"):
        return _Activations(0.0, working)
    between = pack.tokens * shape.projector.text_kept * compute  # layers of the projector, never checkpointed
    ends = between + pack.tokens * language.width * (1 + FP32 + (FP32 if train and language.gated else 0))  # places of images, final norm
    checkpointed = train.activation_checkpointing if train else stage.frozen_activation_checkpointing
    layers = language.layers - (0 if train else shape.projector.enters)
    if checkpointed:
        return _Activations(pack.tokens * layers * language.width * residual + ends, pack.tokens * layer + working)
    return _Activations(pack.tokens * layers * layer + ends, working)


def _language_layer(shape: ModelShape, stage: Stage, compute: int, on_gpu: bool) -> float:
    """Bytes per token that autograd keeps for one decoder layer."""
    language, trained = shape.language, stage.train.language is not None
    width, inner, query = language.width, language.mean_intermediate, language.query_width
    value = language.value_width
    ring = stage.parallel.sequence_exchange == "ring"
    grouped = on_gpu or language.masked or ring  # exact attention on CPU repeats keys and values for every head
    key = language.key_width if grouped else query
    autocast = stage.parallel.strategy == "ddp" and compute < FP32
    norms = language.norms * FP32 * width
    attention = compute * (query + key + value + min(key, value)) + FP32 * language.heads
    rotary = 2 * language.head_size * (FP32 if autocast else compute) if language.rotary else 0.0
    feed_forward = (3 if language.gated else 1) * inner * compute
    if not language.gated and language.head_norms:  # LayerNorms of heads: what comes into them, query, key and value together
        attention += 2 * compute * query
    if language.scaled_heads:  # what comes into them and what their scales multiply, of queries and keys
        attention += 2 * compute * (query + language.key_width)
    if language.latent:  # the narrow vectors, their norms, and keys whose two pieces are put together
        ranks = language.latent.query_rank + language.latent.key_rank
        attention += 2 * FP32 * ranks + (compute * 2 * ranks if trained else 0)
    if language.experts:  # a copy of the token for each of its experts, on the way in (for their gradients) and out
        copies = language.sparse_layers / language.layers * language.experts.per_token
        feed_forward += compute * width * copies * (2 if trained else 1) + 2 * FP32 * language.router_width
    if trained:
        if autocast:  # each of the five projections casts its input by itself
            norms += language.norms * FP32 * width + 5 * compute * width
        else:
            norms += (2 if language.gated else 1) * language.norms * compute * width
        attention += 0 if on_gpu else compute * query
        feed_forward += inner * compute if language.rotary else 0  # plain ReLU keeps what it gives alone
    return norms + attention + rotary + feed_forward


def _own_inputs(shape: ModelShape, stage: Stage, pack: PackSize, on_gpu: bool) -> float:
    """Numbers per token of a layer whose matrices visual tokens have of their own: each matrix that trains keeps a copy of its kind's
    inputs, in place of one that all matrices share."""
    language = shape.language
    if not shape.projector.in_place:
        return 0.0
    inner, shared = 5 * language.width + language.query_width + language.intermediate, 0.0
    if stage.train.language is not None:
        shared = 2 * language.width + (0 if on_gpu else language.query_width) + language.intermediate
    visual = min(1.0, pack.visual_tokens / pack.tokens)
    return inner * (visual * (stage.train.projector is not None) + (1 - visual) * (stage.train.language is not None)) - shared


def _adapter_values(shape: ModelShape, part: PartName, compute: int) -> float:
    """Bytes per token that a part's adapters keep beside what its layers keep when they train: between A and B, and behind dropout
    (values and a mask)."""
    adapters = shape.adapters_of(part)
    return adapters.ranks * compute + adapters.dropped * (compute + 1)


def _vision_activations(shape: ModelShape, stage: Stage, pack: PackSize, compute: int, on_gpu: bool) -> _Activations:
    """Vision tower and projector."""
    vision, train = shape.vision, stage.train.vision
    patches = pack.visual_tokens * vision.patches_per_token
    residual = FP32 if stage.parallel.strategy == "ddp" else compute
    block = _vision_block(shape, stage, compute, on_gpu) + _adapter_values(shape, "vision", compute) / max(1, vision.depth)
    products = 3 if vision.gated else 2
    working = patches * (products * vision.intermediate * compute + 2 * vision.width * residual)
    merged = shape.projector.inner * shape.projector.times
    kept = 0.0
    if gradients_reach(stage, "projector"):
        trained = stage.train.projector is not None
        kept += patches / vision.merged_patches * vision.width * (FP32 + (FP32 if trained else 0)) + pack.visual_tokens * merged * compute
        kept += 2 * pack.visual_tokens * merged * compute if trained else 0.0
        given = 0 if shape.projector.first else shape.language.width * residual
        kept += pack.visual_tokens * (given + _adapter_values(shape, "projector", compute))
    if train is None:
        return _Activations(kept, working)
    kept += patches * vision.patch_values * compute  # the pixels, for the patch embedding's gradient
    kept += patches * (vision.outer_norms * vision.width * (FP32 + compute) + vision.mask_keys * compute)
    blocks = vision.whole_blocks + vision.idle_blocks
    if vision.merger_products:  # inside the tower, never checkpointed: two norms, attention, two matrices over merged patches
        kept += patches * (compute * (8 * vision.width + 2 * vision.intermediate) + FP32 * (2 * vision.width + vision.heads))
    if train.activation_checkpointing:
        return _Activations(kept + patches * blocks * vision.width * residual, patches * block + working)
    return _Activations(kept + patches * blocks * block, working)


def _vision_block(shape: ModelShape, stage: Stage, compute: int, on_gpu: bool) -> float:
    """Bytes per patch that autograd keeps for one vision block, which trains."""
    vision = shape.vision
    width, inner = vision.width, vision.intermediate
    autocast = stage.parallel.strategy == "ddp" and compute < FP32
    if vision.gated:  # RMSNorm keeps its input and the normalised values
        norms = 2 * 2 * FP32 * width if autocast else 2 * (FP32 + compute) * width
        feed_forward = 4 * inner * compute
    else:
        norms = 2 * FP32 * width if autocast else 2 * compute * width
        feed_forward = vision.kept_inner * inner * compute
    inputs = compute * width * ((3 if vision.gated else 2) if autocast else 2)
    attention = compute * width * (4 if on_gpu else 5) + FP32 * vision.heads
    return norms + inputs + attention + feed_forward
