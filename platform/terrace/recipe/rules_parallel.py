"""Rules about how a stage is spread over its workers: what each strategy offers, and which ranks may share a pack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from terrace.families.configurations import language_config
from terrace.families.registry import family_class
from terrace.recipe.errors import Path, Problem
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Recipe, Stage


def check(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    parallel, key = stage.parallel, (*at, "parallel")
    strategy = parallel.strategy
    if parallel.offload_optimizer != "none" and strategy == "ddp":
        yield Problem((*key, "offload_optimizer"), "ddp keeps the optimizer on its GPU; use zero1, zero2, zero3 or fsdp")
    if parallel.offload_parameters != "none" and strategy not in ("zero3", "fsdp"):
        yield Problem((*key, "offload_parameters"), f"{strategy} does not shard parameters; use zero3 or fsdp")
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(parallel, name) == "nvme":
            if strategy != "zero3":
                yield Problem((*key, name), f"nvme is offered by zero3 only, not by {strategy}")
            if parallel.nvme_path is None:
                yield Problem((*key, "nvme_path"), f"{name}: nvme needs the path of a local disk")
    if parallel.nvme_path is not None and "nvme" not in (parallel.offload_optimizer, parallel.offload_parameters):
        yield Problem((*key, "nvme_path"), "is given but nothing is offloaded to nvme")
    if strategy != "fsdp":
        if parallel.hybrid_shard_size is not None:
            yield Problem((*key, "hybrid_shard_size"), f"is an option of fsdp, not of {strategy}")
        if not parallel.reshard_after_forward:
            yield Problem((*key, "reshard_after_forward"), f"is an option of fsdp, not of {strategy}")
        if parallel.reduce_every_pack is not None:
            yield Problem((*key, "reduce_every_pack"), f"is an option of fsdp, not of {strategy}")
    elif parallel.hybrid_shard_size is not None:
        workers = stage.resources.workers
        for count in {workers} if isinstance(workers, int) else set(workers):
            if count % parallel.hybrid_shard_size:
                yield Problem((*key, "hybrid_shard_size"), f"{parallel.hybrid_shard_size} does not divide {count} workers")
    if parallel.experts > 1:
        yield from _experts(recipe, stage, (*key, "experts"))
    if parallel.compile and strategy == "zero3":
        told = "zero3 gathers weights around every layer inside a block, which would cut graphs to pieces; use fsdp, or leave compile out"
        yield Problem((*key, "compile"), told)
    if parallel.compile and recipe.model.attention == "flex":
        yield Problem((*key, "compile"), "model.attention: flex is compiled by itself; choose auto or varlen, or leave compile out")
    if parallel.sequence_parallel > 1:
        yield from _sequence_parallel(recipe, stage, (*key, "sequence_parallel"))
    elif parallel.sequence_exchange != "heads":
        yield Problem((*key, "sequence_exchange"), "says how ranks share a pack; give sequence_parallel, the number of them, as well")


def _sequence_parallel(recipe: Recipe, stage: Stage, key: Path) -> Iterator[Problem]:
    """All-to-all deals whole attention heads, so their number decides how many ranks may share a pack."""
    size = stage.parallel.sequence_parallel
    if not OBJECTIVES[stage.objective].shares_packs:
        yield Problem(key, f"{size} ranks may share a pack under the objective lm only, not under {stage.objective}")
    text = language_config(recipe.model.config or {})
    heads, key_heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if stage.parallel.sequence_exchange == "ring":
        return  # no head is dealt
    if not (isinstance(heads, int) and isinstance(key_heads, int) and heads > 0 and key_heads > 0):
        return  # named elsewhere, or known only to the pretrained directory: checked again when training starts
    if heads % size or (key_heads % size and size % key_heads):
        yield Problem(
            key,
            f"{size} ranks cannot share {heads} attention heads and {key_heads} key/value heads evenly: it must divide "
            f"{heads}, and divide {key_heads} or be a multiple of it (or sequence_exchange: ring, which deals no heads)",
        )


def _experts(recipe: Recipe, stage: Stage, key: Path) -> Iterator[Problem]:
    """What dividing experts over ranks asks of a stage."""
    size, strategy, family = stage.parallel.experts, stage.parallel.strategy, family_class(recipe.model.architecture)
    if not family.experts:
        yield Problem(key, f"{family.name} has no experts to divide; leave it out")
    if strategy != "ddp":
        yield Problem(key, f"is an option of ddp, not of {strategy}, which divides every tensor over all workers already; leave it out")
    if not OBJECTIVES[stage.objective].shares_packs:
        told = "every rank must make the same passes, and it has passes of single ranks"
        yield Problem(key, f"{size} ranks may share experts under the objective lm only, not under {stage.objective}: {told}")
    if stage.optimizer.kind == "adafactor":
        yield Problem(key, "adafactor measures whole tensors, of which a rank has a part here; use optimizer.kind adamw, sgd or muon")
    if stage.gradient_noise:
        yield Problem(key, "gradient_noise needs gradients of single workers, and those of experts are of all that share them")
    count = expert_count(recipe.model.config or {})
    if count and count % size:
        yield Problem(key, f"{size} ranks cannot share {count} experts evenly: it must divide {count}")


def expert_count(config: Mapping[str, Any]) -> int | None:
    """Experts of a sparse layer that a model's configuration states; None where it does not."""
    text = language_config(config)
    stated = (text.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    found = next((number for number in stated if number), None) or (config.get("experts") or {}).get("count")
    return found if isinstance(found, int) else None
