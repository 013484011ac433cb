"""Options of the objective `grpo`, and what rewards its answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from terrace.recipe.schema_inputs import Positive, Share, Strict


class OverlapOptions(Strict):
    """Generation that goes on while the policy trains. Correction as in TRL's vllm_importance_sampling_mode and AReaL."""

    max_staleness: int = Field(
        1, ge=0,
        description="How many iterations older than those that train the weights may be that sampled a token; older groups are dropped and"
        " counted. 0 is on-policy.",
    )  # fmt: skip
    correction: Literal["token", "sequence", "none"] = Field(
        "token",
        description="By what the gradient of a token is weighted: the probability under the weights that train over that under those that"
        " sampled, of the token or of its whole response.",
    )
    beyond: Literal["clip", "mask"] = Field(
        "clip", description="What happens to a weight above `bound`: it is the bound, or the token (or response) does not train."
    )
    bound: Annotated[float, Field(gt=1)] = Field(2.0, description="The largest weight.")


class GrpoOptions(Strict):
    """MORL as published: on-policy, one step per rollout batch, no clip, no KL (MiMo-VL section 3.3)."""

    prompts_per_iteration: int = Field(32, ge=1, description="Prompts of one on-policy iteration.")
    samples_per_prompt: int = Field(8, ge=2, description="Responses sampled for each prompt (the group).")
    max_response_tokens: int = Field(512, ge=1, description="Longest response.")
    temperature: Positive = Field(1.0, description="Sampling temperature.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus sampling mass.")
    updates_per_rollout: int = Field(1, ge=1, description="Optimizer steps per rollout batch; 1 is on-policy.")
    normalise: Literal["std", "batch", "none"] = Field(
        "std", description="By which standard deviation of rewards advantages are divided: of the group, of all groups of the update, none."
    )
    baseline: Literal["mean", "leave_one_out", "batch"] = Field(
        "mean",
        description="What is subtracted from a reward: the mean of its group, of the others in it (RLOO), or of all groups of the update"
        " (REINFORCE++).",
    )
    average: Literal["tokens", "responses", "constant"] = Field(
        "tokens",
        description="What weighs alike in the loss: response tokens (MORL, DAPO), responses (GRPO as first published), or tokens against"
        " max_response_tokens (Dr. GRPO).",
    )
    ratio: Literal["token", "sequence"] = Field(
        "token", description="Probability ratio of each token, or of the whole response as the mean over its tokens (GSPO)."
    )
    surrogate: Literal["clip", "cispo"] = Field(
        "clip",
        description="`clip`: a clipped token has no gradient any more (PPO); `cispo`: the ratio, at most 1 + clip_high, weighs the gradient"
        " of every token (MiniMax-M1).",
    )
    clip_low: Positive | None = Field(None, description="Lower clip of the probability ratio; unset: none.")
    clip_high: Positive | None = Field(None, description="Upper clip of the probability ratio; unset: none.")
    clip_ceiling: Annotated[float, Field(gt=1)] | None = Field(
        None, description="Bound of the ratio itself, which also holds where the advantage is negative (dual clip); unset: none."
    )
    truncated: Literal["train", "leave_out"] = Field(
        "train",
        description="Whether a response that ran into max_response_tokens trains; its reward counts in its group's baseline either way"
        " (over-long filtering of DAPO).",
    )
    overlong_buffer_tokens: int | None = Field(
        None,
        ge=1,
        description="Within so many tokens of max_response_tokens the reward falls linearly, to overlong_penalty less at the end (soft"
        " punishment of DAPO); unset: never.",
    )
    overlong_penalty: Positive = Field(1.0, description="What a response of full length loses with overlong_buffer_tokens.")
    kl_coefficient: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight of the KL penalty to the starting weights.")
    entropy_coefficient: float = Field(0.0, description="Weight of the entropy bonus.")
    dynamic_sampling: bool = Field(True, description="Sample further prompts where all rewards of a group are equal.")
    overlap: OverlapOptions | None = Field(
        None, description="Generate while the policy trains, with rollout seamless; unset: each waits for the other (on-policy)."
    )
    max_sampling_rounds: int = Field(
        4, ge=1, description="Rounds of dynamic sampling at most; with rollout seamless: draws at most, times prompts_per_iteration."
    )
    rollout: Literal["rounds", "seamless"] = Field(
        "rounds",
        description="`rounds`: all groups of a round end before further prompts are drawn; `seamless`: the next prompt begins wherever a"
        " place is free, until enough groups teach something.",
    )
    easy_pool_probability: Share = Field(0.0, description="Chance to draw a prompt that is already solved.")
    drop_pass_rate_above: Share | None = Field(None, description="Prompts solved more often than this leave the pool.")
    engine: Literal["native", "vllm"] = Field("native", description="What generates responses.")
    compile_decoding: bool = Field(
        False,
        description="Decode with steps that a C compiler has compiled, where the device is a CPU, the precision fp32 and the model of the"
        " usual kind (docs/rl.md); elsewhere, and without a compiler, as without it, and the log says why.",
    )
    shard_copy: bool | None = Field(
        None,
        description="Under fsdp and zero3, engine native decodes with a copy: false, a whole one on every worker; true, divided by the"
        " workers, which then decode in step and gather each layer as it runs. Unset: true where a whole one does not fit on a GPU.",
    )
    placement: Literal["colocated", "separate"] = Field(
        "colocated", description="Whether the training workers generate, or rollout workers of their own."
    )
    rollout_workers: int = Field(
        1, ge=1, description="Rollout workers of placement separate, each with the CPUs and GPUs of a training worker."
    )
    evaluation_samples: int = Field(
        4, ge=1, description="Sampled responses to each held-out prompt in an evaluation, beside a greedy one."
    )
    max_reward_failure_rate: Share = Field(0.2, description="Share of failed rewards above which the stage stops.")
    max_logprob_mismatch: Positive = Field(0.1, description="Allowed difference of log-probabilities between generation and training.")


class EnvironmentRule(Strict):
    """What answers back: a conversation of several turns with each prompt of the task (docs/rl.md)."""

    name: str = Field(description="`clicking`, or a function as package.module:function.")
    options: dict[str, Any] = Field({}, description="Options of the function.")
    turns: int = Field(4, ge=1, le=256, description="Answers of the policy at most, each of at most grpo.max_response_tokens.")
    max_observation_tokens: int = Field(512, ge=1, description="Longest observation, its pictures and marks among it.")


class RewardRule(Strict):
    name: str = Field(description="A registered reward, e.g. counting, grounding, gui_point, visual_reasoning, remote.")
    weight: Positive = Field(1.0, description="Weight of the reward within its task.")
    options: dict[str, Any] = Field({}, description="Options of the reward.")
