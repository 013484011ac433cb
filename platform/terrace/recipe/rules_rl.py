"""Rules about objectives: which kinds of samples each one reads, and what reinforcement learning needs to know."""

from __future__ import annotations

import re
from collections.abc import Iterator

from terrace.errors import nearest
from terrace.recipe.errors import Path, Problem
from terrace.recipe.objectives import OBJECTIVES, OPTIONS
from terrace.recipe.schema import Recipe, Stage
from terrace.recipe.schema_grpo import GrpoOptions

REWARD_NAME = re.compile(r"[a-z][a-z0-9_]*|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
ADDRESS_OPTIONS = ("url", "endpoint", "service")
ENVIRONMENTS = ("clicking",)  # that come with Terrace


def check(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    sources = {name: recipe.data.sources[name] for name in stage.mixture.weights if name in recipe.data.sources}
    entry = OBJECTIVES[stage.objective]
    for name, source in sources.items():
        key: Path = (*at, "mixture", "weights", name)
        if (use := entry.refused_kinds.get(source.kind)) is not None:
            yield Problem(
                key, f"`{name}` holds {source.kind}s, which objective {stage.objective} has no answer to learn from; use {use}"
            )
        if entry.only_kind is not None and source.kind != entry.only_kind:
            yield Problem(
                key, f"objective {stage.objective} learns from answers of kind {entry.only_kind}; `{name}` is of kind {source.kind}"
            )
    for name in OPTIONS:
        if name != stage.objective and getattr(stage, name) is not None:
            yield Problem((*at, name), f"is an option of objective {name}; this stage's objective is {stage.objective}")
    with_heads, heads = entry.heads, [name for name, one in OBJECTIVES.items() if one.heads]
    if with_heads and stage.train.heads is None:
        yield Problem((*at, "train"), f"objective {stage.objective} trains heads: give train.heads its lr")
    elif not with_heads and stage.train.heads is not None:
        names = f"{', '.join(heads[:-1])} and {heads[-1]}"
        yield Problem((*at, "train", "heads"), f"are trained by objectives {names}; this stage's objective is {stage.objective}")
    if stage.objective == "grpo":
        yield from _grpo(recipe, stage, at)
        return
    if entry.only_kind == "preference" and stage.budget.tokens is not None:
        yield Problem((*at, "budget", "tokens"), f"objective {stage.objective} counts pairs: give steps, samples or epochs")
    if stage.dpo is not None and stage.dpo.loss == "ipo" and stage.dpo.label_smoothing:
        yield Problem((*at, "dpo", "label_smoothing"), "ipo's target margin has no labels to smooth; leave it out")
    for key in ("rewards", "environment"):
        if getattr(stage, key):
            yield Problem((*at, key), f"belongs to objective grpo; this stage's objective is {stage.objective}")


def _grpo(recipe: Recipe, stage: Stage, at: Path) -> Iterator[Problem]:
    yield from _environment(stage, (*at, "environment"))
    tasks = {**stage.rewards, **stage.environment}
    if not tasks:
        yield Problem((*at, "rewards"), "objective grpo needs at least one reward rule per task")
    for task, rules in stage.rewards.items():
        if not rules:
            yield Problem((*at, "rewards", task), "has no rule, so every answer would be worth nothing")
        for index, rule in enumerate(rules):
            key: Path = (*at, "rewards", task, index)
            if not REWARD_NAME.fullmatch(rule.name):
                yield Problem((*key, "name"), f"`{rule.name}` is neither a reward's name nor package.module:function")
            if rule.name == "remote" and not any(word in option for option in rule.options for word in ADDRESS_OPTIONS):
                yield Problem(key, "reward `remote` calls a service and needs its address: options: {url: http://...}")
    for name in stage.mixture.weights:
        source = recipe.data.sources.get(name)
        if source is None:
            continue
        key = ("data", "sources", name, "task")
        if source.task is None:
            yield Problem(key, f"stage `{stage.name}` needs the reward task of `{name}`{nearest('', tasks)}")
        elif tasks and source.task not in tasks:
            yield Problem(key, f"stage `{stage.name}` has no reward for task `{source.task}`{nearest(source.task, tasks)}")
    options = stage.grpo
    if options is None:
        return
    key = (*at, "grpo")
    if stage.environment and options.max_response_tokens < stage.sequence_length <= stage.longest_conversation:
        yield Problem(
            (*at, "sequence_length"),
            f"{stage.sequence_length} leaves no room for a prompt beside a conversation of {stage.longest_conversation} tokens (turns x "
            "grpo.max_response_tokens and the observations between them)",
        )
    if options.max_response_tokens >= stage.sequence_length:
        yield Problem(
            (*key, "max_response_tokens"),
            f"{options.max_response_tokens} leaves no room for a prompt in sequence_length {stage.sequence_length}",
        )
    if options.placement == "colocated" and options.rollout_workers != 1:
        yield Problem((*key, "rollout_workers"), "counts the workers of placement separate; with colocated the training workers generate")
    if options.updates_per_rollout == 1:
        for name in ("clip_low", "clip_high", "clip_ceiling"):
            if getattr(options, name) is not None:
                yield Problem((*key, name), "clips a ratio that is always 1 with updates_per_rollout 1; leave it out")
    if options.surrogate == "cispo" and (options.clip_low is not None or options.clip_ceiling is not None):
        yield Problem((*key, "surrogate"), "`cispo` bounds the ratio by clip_high alone; leave clip_low and clip_ceiling out")
    if options.overlong_buffer_tokens is not None and options.overlong_buffer_tokens > options.max_response_tokens:
        told = f"{options.overlong_buffer_tokens} is more than max_response_tokens {options.max_response_tokens}"
        yield Problem((*key, "overlong_buffer_tokens"), told)
    if options.baseline == "leave_one_out" and options.normalise == "batch":
        yield Problem((*key, "normalise"), "`batch` has no published form with baseline leave_one_out; use mean or batch")
    yield from _rollout(stage, options, key)


def _rollout(stage: Stage, options: GrpoOptions, key: Path) -> Iterator[Problem]:
    if options.compile_decoding and options.engine == "vllm":
        yield Problem((*key, "compile_decoding"), "is of engine native; vLLM compiles for itself")
    yield from _shard_copy(stage, options, (*key, "shard_copy"))
    if options.rollout == "seamless" and options.placement == "separate":
        yield Problem((*key, "rollout"), "`seamless` decodes on the training workers; rollout workers of placement separate have rounds")
    if options.rollout == "seamless" and stage.environment:
        yield Problem((*key, "rollout"), "`seamless` answers a prompt once; tasks with an `environment` have rounds")
    overlap = options.overlap
    if overlap is None:
        return
    if options.rollout != "seamless":
        yield Problem((*key, "overlap"), "keeps what is left over for the next iteration, which has no rounds; set rollout: seamless")
    if overlap.max_staleness and options.engine == "vllm":
        told = "needs weights that change between two steps and tokens that say which sampled them, as engine native has them; set"
        yield Problem((*key, "overlap", "max_staleness"), f"{told} max_staleness 0 with vllm")
    if overlap.max_staleness and (options.easy_pool_probability or options.drop_pass_rate_above is not None):
        name = "easy_pool_probability" if options.easy_pool_probability else "drop_pass_rate_above"
        told = "changes what is drawn after every iteration, and with overlap the next prompts are drawn already; leave one of them out"
        yield Problem((*key, name), told)


def _shard_copy(stage: Stage, options: GrpoOptions, key: Path) -> Iterator[Problem]:
    if options.shard_copy is None:
        return
    if options.engine != "native" or options.placement != "colocated" or stage.parallel.strategy not in ("fsdp", "zero3"):
        yield Problem(key, "is about the copy that engine native decodes with, colocated, under fsdp or zero3; leave it out")
    elif options.shard_copy and options.rollout != "rounds":
        yield Problem(key, "lets the workers decode in step, one round after another; set rollout: rounds")
    elif options.shard_copy and options.compile_decoding:
        yield Problem(key, "gathers layers as they run, which a compiled step does not do; leave compile_decoding out")


def _environment(stage: Stage, at: Path) -> Iterator[Problem]:
    """An environment for a task that no source has is found where the sources are known: its rows name tasks too."""
    for task, rule in stage.environment.items():
        key: Path = (*at, task, "name")
        if not REWARD_NAME.fullmatch(rule.name):
            yield Problem(key, f"`{rule.name}` is neither an environment's name nor package.module:function")
        elif ":" not in rule.name and rule.name not in ENVIRONMENTS:
            yield Problem(key, f"`{rule.name}` is no environment{nearest(rule.name, ENVIRONMENTS)}; yours is named package.module:function")
        if rule.name == "clicking" and stage.rewards.get(task):
            yield Problem((*at[:-1], "rewards", task), "`clicking` pays by itself; leave the task's rules out")
