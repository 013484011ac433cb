"""Every rule across fields refuses what it should, at the key to change, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from terrace.recipe.errors import RecipeError
from terrace.recipe.loading import load_recipe
from terrace.recipe.rules import allowed_worker_counts, produced_metrics

TINY = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
PREFERENCES = "data.sources.pairs={uri: x, kind: preference}"
PROMPTS = "data.sources.prompts={uri: x, kind: prompt, task: counting}"
GRPO = (
    PROMPTS,
    "stages.3.objective=grpo",
    "stages.3.mixture={prompts: 1, instructions: null, documents: null, text: null}",
)
REWARDS = "stages.3.rewards={counting: [{name: counting}]}"

REFUSED = [
    # (overrides, key of the problem, words of the message)
    (["stages.1.train={vision: null, projector: null}"], "stages.1.train", "names no part"),
    (["stages.0.mixture.nowhere=1"], "stages.0.mixture.weights.nowhere", "not a source"),
    (["stages.0.mixture={weights: {captions: 1}, epoch_caps: {text: 1}}"], "stages.0.mixture.epoch_caps.text", "mixture"),
    (["stages.0.mixture={captions: null, text: 1}"], "stages.0.mixture", "only text"),
    (["stages.0.budget={steps: null}"], "stages.0.budget", "exactly one"),
    (["stages.0.budget={steps: 5, tokens: 5}"], "stages.0.budget", "steps and tokens"),
    (["stages.0.budget.steps=0"], "stages.0.budget.steps", "greater than 0"),
    (["stages.0.schedule.warmup=1.5"], "stages.0.schedule.warmup", "whole number"),
    (["stages.0.schedule.warmup=4"], "stages.0.schedule.warmup", "none of the stage's 4 steps"),
    (["stages.0.pixels={min: 800, max: 1500}"], "stages.0.pixels", "the nearest have 784 and 1568"),
    (["stages.0.pixels.max=783"], "stages.0.pixels.max", "no image"),
    (["stages.0.pixels={min: 9000, max: 8000}"], "stages.0.pixels.min", "more than"),
    (["stages.0.sequence_length=66"], "stages.0.sequence_length", "64 visual tokens and 2 markers"),
    (["stages.0.data_loading.max_visual_tokens_per_pack=63"], "stages.0.data_loading.max_visual_tokens_per_pack", "64"),
    (["stages.0.batch.packs=5", "stages.0.resources.workers=2"], "stages.0.batch.packs", "evenly to 2 workers"),
    (["stages.0.batch.packs=6", "stages.0.resources.workers=[2, 4]"], "stages.0.batch.packs", "evenly to 4 workers"),
    (["stages.0.resources.workers=[4, 2]"], "stages.0.resources.workers", "[min, max]"),
    (["stages.0.resources.workers=0"], "stages.0.resources.workers", "[min, max]"),
    (["stages.0.parallel.sequence_parallel=2"], "stages.0.resources.workers", "sequence_parallel"),
    (["stages.0.parallel.sequence_parallel=3", "stages.0.resources.workers=3"],
     "stages.0.parallel.sequence_parallel", "3 ranks cannot share"),
    (["stages.0.parallel.compile=true", "model.attention=flex"], "stages.0.parallel.compile", "compiled by itself"),
    (["stages.0.parallel={compile: true, strategy: zero3}"], "stages.0.parallel.compile", "use fsdp"),
    (["stages.0.parallel.experts=2", "stages.0.resources.workers=2"], "stages.0.parallel.experts", "no experts to divide"),
    (["stages.0.parallel.experts=2", "stages.0.resources.workers=3"], "stages.0.resources.workers", "groups of parallel.experts 2"),
    (["stages.0.parallel={experts: 2, strategy: fsdp}", "stages.0.resources.workers=2"],
     "stages.0.parallel.experts", "divides every tensor"),
    (["stages.0.parallel.experts=2", "stages.0.optimizer.kind=adafactor"], "stages.0.parallel.experts", "measures whole tensors"),
    (["stages.0.parallel.experts=2", "stages.0.gradient_noise=true"], "stages.0.parallel.experts", "gradients of single workers"),
    (["stages.0.parallel.sequence_exchange=ring"], "stages.0.parallel.sequence_exchange", "give sequence_parallel"),
    (["model={architecture: paligemma, config: null, pretrained: /p}", "stages.0.parallel={sequence_parallel: 2, sequence_exchange: ring}"],
     "stages.0.parallel.sequence_exchange", "see later ones"),
    ([*GRPO, REWARDS, "stages.3.parallel.sequence_parallel=2", "stages.3.resources.workers=2"],
     "stages.3.parallel.sequence_parallel", "objective lm only"),
    (["stages.0.failure.hang_timeout_seconds=1800"], "stages.0.failure.hang_timeout_seconds", "not below stall_timeout_seconds"),
    (["stages.0.resources.gpus_per_worker=1.5"], "stages.0.resources.gpus_per_worker", "1.5"),
    (["stages.0.parallel.offload_optimizer=cpu"], "stages.0.parallel.offload_optimizer", "ddp"),
    (["stages.0.parallel={strategy: zero2, offload_parameters: cpu}"], "stages.0.parallel.offload_parameters", "zero2"),
    (["stages.0.parallel={strategy: zero3, offload_optimizer: nvme}"], "stages.0.parallel.nvme_path", "local disk"),
    (["stages.0.parallel={strategy: fsdp, offload_parameters: nvme, nvme_path: /d}"],
     "stages.0.parallel.offload_parameters", "zero3 only"),
    (["stages.0.parallel.nvme_path=/d"], "stages.0.parallel.nvme_path", "nothing is offloaded"),
    (["stages.0.parallel.hybrid_shard_size=1"], "stages.0.parallel.hybrid_shard_size", "option of fsdp"),
    (["stages.0.parallel.reduce_every_pack=true"], "stages.0.parallel.reduce_every_pack", "option of fsdp"),
    (["stages.0.parallel.reshard_after_forward=false"], "stages.0.parallel.reshard_after_forward", "option of fsdp"),
    (["stages.0.parallel={strategy: fsdp, hybrid_shard_size: 3}", "stages.0.resources.workers=4"],
     "stages.0.parallel.hybrid_shard_size", "does not divide 4"),
    (["stages.0.precision=fp16"], "stages.0.precision", "on CPU"),
    (["model.attention=varlen"], "model.attention", "needs a GPU"),
    (["stages.0.gates=[{metric: eval/caption/loss}]"], "stages.0.gates.0", "has neither"),
    (["stages.0.gates=[{metric: eval/caption/loss, below: 1, above: 0}]"], "stages.0.gates.0", "has both"),
    (["stages.0.gates=[{metric: eval/text/loss, below: 1}]"], "stages.0.gates.0.metric", "not measured in this stage"),
    (["stages.0.gates=[{metric: eval/caption/loss, below: 1}]", "data.sources.captions.holdout_samples=0"],
     "stages.0.gates.0.metric", "holdout_samples"),
    (["stages.0.evaluate.every_steps=2", "data.sources.captions.holdout_samples=0"],
     "stages.0.evaluate.every_steps", "nothing to evaluate"),
    (["stages.0.evaluate.suites=['countign:sets/a.jsonl']"], "stages.0.evaluate.suites.0", "did you mean `counting`"),
    (["stages.0.evaluate.suites=[counting]"], "stages.0.evaluate.suites.0", "counting:PATH"),
    (["stages.0.evaluate.suites=['gui:a/x.jsonl', 'gui:b/x.jsonl']"], "stages.0.evaluate.suites.1", "gui:x too"),
    (["stages.0.checkpoint={keep_every_steps: 3}"], "stages.0.checkpoint.keep_every_steps", "multiple"),
    (["stages.0.checkpoint={every_steps: null, keep_every_steps: 3}"], "stages.0.checkpoint.keep_every_steps", "not given"),
    (["stages.0.checkpoint.best_metric=eval/caption/loss"], "stages.0.checkpoint.best_metric", "checkpoint.every_steps"),
    (
        ["stages.0.checkpoint={every_steps: 10, best_metric: eval/caption/loss}", "stages.0.evaluate.every_steps=4"],
        "stages.0.checkpoint.best_metric",
        "evaluate.every_steps that divides",
    ),
    (["stages.0.name=alignment"], "stages.1.name", "also the name"),
    (["stages.1.start_from=nothing"], "stages.1.start_from", "no stage"),
    (["stages.1.start_from=pretraining"], "stages.1.start_from", "does not run before"),
    (["stages.1.start_from=alignment"], "stages.1.start_from", "does not run before"),
    (["stages.0.train.projector.layer_decay=0.9"], "stages.0.train.projector.layer_decay", "no layers"),
    (["stages.1.train.vision.optimizer_state=keep"], "stages.1.train.vision.optimizer_state", "does not train vision"),
    (["stages.0.train.projector.optimizer_state=keep"], "stages.0.train.projector.optimizer_state", "initial weights"),
    (["planning.source_tokens_per_sample={captoins: 3}"], "planning.source_tokens_per_sample.captoins", "did you mean `captions`"),
    (["data.sources.captions.uri=' '"], "data.sources.captions.uri", "empty"),
    (["data.sources.captions.max_samples=4"], "data.sources.captions.holdout_samples", "none is left"),
    (["model.config=null"], "model", "needs `config` or `pretrained`"),
    (["model={config: {}, pretrained: x}"], "model", "exclude each other"),
    (["model.pretrained=/x", "model.init.vision=/y"], "model.init", "only adds"),
    (["tokenizer={path: x, train_vocabulary_size: 400}"], "tokenizer", "has both"),
    (["tokenizer=/x"], "model.config.text_config", "needs `vocab_size`"),
    (["model.architecture=qwen2_vl"], "model.config.vision_config", "needs `embed_dim`"),
    (["model.config.model_type=llava"], "model.config.model_type", "llava"),
    (["model.config.text_config.num_attention_heads=3"], "model.config.text_config.num_attention_heads", "do not divide"),
    (["model.config.text_config.num_key_value_heads=3"], "model.config.text_config.num_key_value_heads", "not divide"),
    (["model.config.text_config.rope_parameters.mrope_section=[2, 2, 2]"], "model.config.text_config", "sum to 8"),
    (["model.config.text_config.rope_parameters=null"], "model.config.text_config", "mrope_section"),
    (["model.config.vision_config.out_hidden_size=32"], "model.config.vision_config", "takes 64"),
    (["model.config.vision_config.patch_size=16"], "model.config.vision_config.patch_size", "14"),
    (["model.config.vision_config.num_heads=3"], "model.config.vision_config.num_heads", "multiple of 4"),
    (["model.config.vision_config.fullatt_block_indexes=[2]"], "model.config.vision_config.fullatt_block_indexes", "depth"),
    (["model.config.vision_config.window_size=100"], "model.config.vision_config.window_size", "28"),
    (["model.config.vision_config.depth=-1"], "model.config.vision_config.depth", "whole number"),
    (["stages.0.grpo={}"], "stages.0.grpo", "objective grpo"),
    (["stages.0.rewards={a: []}"], "stages.0.rewards", "objective grpo"),
    ([PREFERENCES, "stages.0.mixture.pairs=1"], "stages.0.mixture.weights.pairs", "reward_model"),
    (["stages.0.objective=reward_model"], "stages.0.mixture.weights.captions", "preference"),
    (["stages.0.objective=kto"], "stages.0.mixture.weights.captions", "objective kto learns from answers of kind preference"),
    (["stages.0.optimizer.kind=adafactor", "stages.0.parallel.strategy=fsdp"], "stages.0.optimizer.kind", "rows and columns"),
    (["stages.0.optimizer.kind=muon", "stages.0.parallel.strategy=zero2"], "stages.0.optimizer.kind", "ddp or fsdp"),
    (["stages.0.optimizer.momentum=0.9"], "stages.0.optimizer.momentum", "sgd, lars and muon"),
    (["stages.0.optimizer={kind: sgd, nesterov: true}"], "stages.0.optimizer.nesterov", "with momentum"),
    (["stages.0.ema={}", "stages.0.parallel.strategy=zero3"], "stages.0.ema", "ddp or fsdp"),
    (["stages.0.gradient_noise=true", "stages.0.parallel.strategy=fsdp"], "stages.0.gradient_noise", "single workers"),
    (["stages.0.gradient_noise=true", "stages.0.batch.packs=1"], "stages.0.gradient_noise", "two each"),
    (["stages.0.schedule.decay=0.2"], "stages.0.schedule.decay", "option of kind wsd"),
    (["stages.0.schedule={kind: step}"], "stages.0.schedule.milestones", "at least one"),
    (["stages.0.schedule={kind: step, milestones: [2.5]}"], "stages.0.schedule.milestones", "whole number"),
    (["stages.0.schedule={kind: wsd, decay: 0.98}", "stages.0.budget={steps: 100}"], "stages.0.schedule.decay", "none of the stage's"),
    (["stages.0.objective=mtp"], "stages.0.train", "give train.heads its lr"),
    (["stages.0.train.heads={lr: 0.001}"], "stages.0.train.heads", "mtp, medusa, "),
    (["stages.0.objective=medusa", "stages.0.train.heads={lr: 0.001}", "stages.0.mtp={}"], "stages.0.mtp", "objective mtp"),
    (["stages.0.dpo={}"], "stages.0.dpo", "is an option of objective dpo"),
    (["stages.0.objective=simpo", "stages.0.dpo={}"], "stages.0.dpo", "is an option of objective dpo"),
    (["stages.0.objective=dpo", "stages.0.budget={tokens: 1000, steps: null}"], "stages.0.budget.tokens", "counts pairs"),
    (["stages.0.objective=dpo", "stages.0.dpo={loss: ipo, label_smoothing: 0.1}"], "stages.0.dpo.label_smoothing", "no labels"),
    (["stages.0.objective=dpo", "stages.0.parallel.sequence_parallel=2"], "stages.0.parallel.sequence_parallel", "not under dpo"),
    ([*GRPO], "stages.3.rewards", "at least one"),
    ([*GRPO, "stages.3.rewards={counting: []}"], "stages.3.rewards.counting", "no rule"),
    ([*GRPO, "stages.3.rewards={countin: [{name: counting}]}"], "data.sources.prompts.task", "did you mean `countin`"),
    ([*GRPO, REWARDS, "data.sources.prompts.task=null"], "data.sources.prompts.task", "needs the reward task"),
    ([*GRPO, REWARDS, "stages.3.grpo.max_response_tokens=512"], "stages.3.grpo.max_response_tokens", "no room"),
    ([*GRPO, REWARDS, "stages.3.grpo={rollout_workers: 2, max_response_tokens: 9}"], "stages.3.grpo.rollout_workers", "separate"),
    ([*GRPO, REWARDS, "stages.3.grpo={clip_high: 0.2, max_response_tokens: 9}"], "stages.3.grpo.clip_high", "always 1"),
    ([*GRPO, REWARDS, "stages.3.grpo={rollout: seamless, engine: vllm, overlap: {max_staleness: 1}}"],
     "stages.3.grpo.overlap.max_staleness", "set max_staleness 0 with vllm"),
    ([*GRPO, REWARDS, "stages.3.grpo={compile_decoding: true, engine: vllm}"], "stages.3.grpo.compile_decoding", "is of engine native"),
    ([*GRPO, REWARDS, "stages.3.grpo={overlap: {}, max_response_tokens: 9}"], "stages.3.grpo.overlap", "rollout: seamless"),
    ([*GRPO, REWARDS, "stages.3.parallel={strategy: ddp}", "stages.3.grpo={shard_copy: false, max_response_tokens: 9}"],
     "stages.3.grpo.shard_copy", "under fsdp or zero3"),
    ([*GRPO, REWARDS, "stages.3.parallel={strategy: fsdp}",
      "stages.3.grpo={shard_copy: true, rollout: seamless, max_response_tokens: 9}"], "stages.3.grpo.shard_copy", "rollout: rounds"),
    ([*GRPO, REWARDS, "stages.3.parallel={strategy: fsdp}",
      "stages.3.grpo={shard_copy: true, compile_decoding: true, max_response_tokens: 9}"], "stages.3.grpo.shard_copy", "a compiled step"),
    (
        [*GRPO, REWARDS, "stages.3.grpo={overlap: {}, rollout: seamless, easy_pool_probability: 0.1, max_response_tokens: 9}"],
        "stages.3.grpo.easy_pool_probability",
        "overlap",
    ),
    ([*GRPO, REWARDS, "stages.3.gates=[{metric: eval/prompt/loss, above: 1}]"], "stages.3.gates.0.metric", "not measured"),
    ([*GRPO, REWARDS, "stages.3.gates=[{metric: eval/reward/counting, above: 1}]"], "stages.3.gates.0.metric", "not measured"),
    ([*GRPO, "stages.3.rewards={counting: [{name: remote}]}"], "stages.3.rewards.counting.0", "url"),
    ([*GRPO, "stages.3.rewards={counting: [{name: 'my module'}]}"], "stages.3.rewards.counting.0.name", "module:function"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "key", "words"), REFUSED, ids=[f"{row[1]}:{row[2]}" for row in REFUSED])
def test_refused(overrides: list[str], key: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(TINY, overrides)
    found = [(".".join(map(str, problem.path)), problem.message) for problem in caught.value.problems]
    assert any(path == key and words in message for path, message in found), found


ACCEPTED = [
    ["stages.0.mixture={weights: {captions: 1}, unit: tokens, epoch_caps: {captions: 2}}"],
    ["stages.0.batch.packs=512", "stages.0.resources.workers=[64, 128]"],
    ["stages.0.sequence_length=67"],
    ["stages.0.sequence_length=66", "data.sources.captions.too_long=reduce_resolution"],
    ["stages.0.sequence_length=66", "data.sources.captions.max_visual_tokens_per_image=32"],
    ["stages.0.precision=fp16", "stages.0.resources.gpus_per_worker=1"],
    ["stages.0.gates=[{metric: eval/caption/loss, below: 1}]"],
    ["stages.0.gates=[{metric: train/loss, below: 1}]"],
    [*GRPO, REWARDS, "data.sources.prompts.holdout_samples=4", "stages.3.gates=[{metric: eval/reward/counting, above: 0.5}]"],
    ["stages.0.gates=[{metric: 'eval/mmbench:dev/accuracy', above: 0.5}]", "stages.0.evaluate.suites=['mmbench:sets/dev.tsv']"],
    ["stages.1.train.projector.optimizer_state=keep"],
    ["stages.0.parallel={strategy: zero3, offload_optimizer: nvme, nvme_path: /d}"],
    ["stages.0.budget={epochs: 0.5}", "stages.0.budget.steps=null"],
    [PROMPTS, "stages.3.objective=grpo", REWARDS, "stages.3.mixture={prompts: 1, instructions: null, documents: null, text: null}"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", ACCEPTED, ids=[row[-1] for row in ACCEPTED])
def test_accepted(overrides: list[str]) -> None:
    load_recipe(TINY, overrides)


def test_allowed_worker_counts_divide_the_batch() -> None:
    stage = load_recipe(TINY, ["stages.0.batch.packs=24", "stages.0.resources.workers=[2, 8]"]).stages[0]
    assert allowed_worker_counts(stage) == [2, 3, 4, 6, 8]


def test_produced_metrics_are_those_of_the_mixture() -> None:
    recipe = load_recipe(TINY)
    assert produced_metrics(recipe, recipe.stages[0])[:2] == ["eval/caption/loss", "eval/loss"]


def test_kinds_of_suites_are_those_that_can_be_asked():
    from terrace.evaluate.suites import KINDS
    from terrace.recipe.rules import SUITE_KINDS

    assert tuple(KINDS) == SUITE_KINDS


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:hunter2@mlflow:5000", "https://hunter2@mlflow/x", "https://u:hunter2@h", "postgresql+psycopg2://me:hunter2@db/mlflow",
        "s3://AKIAX:hunter2@bucket/x", "s3://AKIAX:ab/hunter2+c=@bucket/x", "S3://AKIAX:hunter2@b", "https://h/x?token=hunter2",
        "https://h/x?a=1&X-Amz-Signature=hunter2", "postgresql://db/x?password=hunter2", "http://user:5000@hunter2", "s3://:hunter2@b/x",
    ],
)  # fmt: skip
def test_credentials_in_uris_are_refused_and_not_repeated(uri: str):
    for key in ("tracking.uri", "data.sources.captions.uri", "data.storage.endpoint_url", "description"):
        with pytest.raises(RecipeError, match=f"{key}: has credentials in its .*environment") as raised:
            load_recipe(TINY, [f"{key}={json.dumps(uri)}"])
        assert "hunter2" not in str(raised.value)
        assert "AKIAX" not in str(raised.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://mlflow:5000", "http://mlflow:5000/a@b", "s3://bucket/a@b/c:d", "sqlite:////data/a:b@c.db", "postgresql://me@db/mlflow",
        "/data/user:me@host", "me@example.org: see http://host/page", "s3://bucket/tokens/secret=1", "https://h/x?max_tokens_seen",
    ],
)  # fmt: skip
def test_other_uris_with_marks_of_credentials_are_fine(uri: str):
    for key in ("tracking.uri", "description"):
        load_recipe(TINY, [f"{key}={json.dumps(uri)}"])
