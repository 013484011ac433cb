"""Stages that bring models of their own: what they take of earlier stages, what is refused, and a whole curriculum of three classes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForPreTraining, AutoTokenizer, CLIPModel

from terrace.curriculum.attempt_worker import run_stage
from terrace.curriculum.graph import source_stage, waits_for
from terrace.curriculum.validate import describe_recipe
from terrace.data.prepare import load_prepared, prepare_data, stage_data
from terrace.demo.corpus import write_corpus
from terrace.errors import InputError, Preempted
from terrace.models.build import build_model, model_config
from terrace.models.taken import check_taken
from terrace.models.tensor_files import Directory
from terrace.planner.data_facts import load_facts
from terrace.planner.plan import make_plan
from terrace.recipe.identity import stage_hash
from terrace.recipe.loading import load_recipe
from terrace.recipe.rules import check
from terrace.recipe.schema import Model, Recipe
from terrace.worker.context import WorkerContext

STAGES = ("mae", "clip", "projector-warmup", "alignment", "multimodal", "dpo", "reward-model", "morl")
SOURCES = {"captions": 24, "grounding": 12, "qa": 12, "counting": 12, "pairs": 24, "rl/counting": 16}
ENCODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    "hidden_act": "gelu",
}  # fmt: skip
MAE = {
    **ENCODER, "decoder_hidden_size": 16, "decoder_intermediate_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "norm_pix_loss": True, "layer_norm_eps": 1e-5,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
    "vocab_size": 330, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


def miniature(folder: Path) -> Recipe:
    """The shipped recipe in two steps a stage."""
    small = [
        *(f"data.sources.{name.replace('/', '-')}.uri={folder / name}.jsonl" for name in SOURCES),
        *(f"data.sources.{name}.holdout_samples=4" for name in ("captions", "grounding", "qa", "counting", "pairs", "rl-counting")),
        *(f"stages.{name}.{change}" for name in STAGES for change in (
            "budget.steps=2", "checkpoint.every_steps=1", "data_loading.engine=inline", "evaluate.max_samples_per_kind=2",
        )),
        *(f"stages.{name}.batch.samples_per_pack=4" for name in ("mae", "clip")),
        *(f"stages.{name}.batch.packs=2" for name in ("dpo", "reward-model")),
        "stages.morl.grpo.prompts_per_iteration=2", "stages.morl.grpo.samples_per_prompt=2", "stages.morl.grpo.max_response_tokens=4",
        "stages.morl.grpo.max_sampling_rounds=1", "tokenizer.train_vocabulary_size=420",
    ]  # fmt: skip
    return load_recipe("demo-encoder-to-morl", small)


def weights_of(run_dir: Path) -> dict[str, str]:
    files = sorted(run_dir.glob("stages/*/final/*.safetensors"))
    return {file.parts[-3]: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_stages(recipe: Recipe, run_dir: Path, count: int, stops: set[str]) -> None:
    """The first stages; those of `stops` are told to stop after their first step and begin again."""
    prepare_data(recipe, run_dir, use_ray=False)
    for number, name in enumerate(STAGES[:count]):
        if name in stops:
            with pytest.raises(Preempted):
                run_stage(recipe, number, run_dir, 1, WorkerContext(should_stop=lambda: "told"))
        run_stage(recipe, number, run_dir, 2, WorkerContext())


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_stages_over_three_classes_end_the_same_when_stopped(count, tmp_path):
    """The three that bring a class each; slow, all eight kinds of stage."""
    torch.set_num_threads(1)
    write_corpus(tmp_path / "corpus", samples=SOURCES, workers=1)
    recipe = miniature(tmp_path / "corpus")
    run_stages(recipe, tmp_path / "whole", count, set())
    run_stages(recipe, tmp_path / "stopped", count, {"clip", "projector-warmup", "reward-model"})
    found = weights_of(tmp_path / "whole")
    assert len(found) == count
    assert weights_of(tmp_path / "stopped") == found

    # Each stage saw its own family's tokens of the same rows; nothing that is held out is trained by any model.
    prepared = load_prepared(tmp_path / "whole" / "data")
    views = [stage_data(recipe, number, prepared)[1] for number in range(8)]
    assert [view.family.name for view in views] == ["vit_mae", "clip", *["terrace_vlm"] * 6]
    assert [set(view.indexes) for view in views[:2]] == [{"captions"}] * 2
    assert set(views[2].indexes) == {name.replace("/", "-") for name in SOURCES}
    held = [{view.indexes["captions"].ids[row] for row in view.indexes["captions"].holdout_rows} for view in views[:3]]
    assert held[0] == held[1] == held[2]
    # The plan counts each stage's own model, and the exports load as their classes with their own end of a turn.
    plan = make_plan(recipe, gpus=1, facts=load_facts(recipe, tmp_path / "whole" / "data"))
    exports = [tmp_path / "whole" / "stages" / f"{number + 1:02d}-{name}" / "final" for number, name in enumerate(STAGES[:count])]
    clip = CLIPModel.from_pretrained(exports[1])
    assert plan.stages[1].parameters["vision"] == sum(p.numel() for p in clip.vision_model.parameters())
    ends = [AutoTokenizer.from_pretrained(export).eos_token for export in (exports[1], exports[-1])]
    assert ends == ["<|endoftext|>", "<|im_end|>"]
    # The warm-up moved the connector alone: the tower of the language model is still CLIP's.
    tower = {name: tensor for name, tensor in clip.vision_model.named_parameters() if "post_layernorm" not in name}
    warmed = Directory(exports[2])
    assert all(torch.equal(warmed.read(f"model.vision_tower.{name}"), tensor) for name, tensor in tower.items())


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_an_encoder_is_the_same_function_as_a_tower(name, tmp_path):
    """CLIP's norm in front of the blocks is the only thing between the two, SigLIP's missing class token likewise."""
    section = Model.model_validate({"architecture": "vit_mae", "config": {**MAE, "mask_ratio": 0.0}})
    mae = build_model(section, model_config(section))
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    mae.save_pretrained(tmp_path / "mae")
    config = {"text_config": TEXT, "vision_config": {**ENCODER, "layer_norm_eps": 1e-5}}
    values = {"architecture": name, "config": config | ({"projection_dim": 16} if name == "clip" else {}),
              "init": {"vision": str(tmp_path / "mae")}}  # fmt: skip
    section = Model.model_validate(values)
    tower = build_model(section, model_config(section)).vision_model
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    vit = AutoModelForPreTraining.from_pretrained(tmp_path / "mae").vit.eval()
    if name == "clip":
        tower.pre_layrnorm = torch.nn.Identity()
        ours = tower.encoder(inputs_embeds=tower.pre_layrnorm(tower.embeddings(pixels))).last_hidden_state
        theirs = vit(pixels, noise=torch.arange(4.0).expand(2, -1)).last_hidden_state
    else:
        ours = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
        embedded = vit.embeddings.patch_embeddings(pixels) + vit.embeddings.position_embeddings[:, 1:]
        for layer in vit.layers:
            embedded = layer(embedded)[0] if isinstance(layer(embedded), tuple) else layer(embedded)
        theirs = vit.layernorm(embedded)
    torch.testing.assert_close(tower.post_layernorm(ours), theirs, atol=2e-6, rtol=1e-5)


def stages_of(**clip: Any) -> dict[str, Any]:
    model = {"architecture": "clip", "init": {"vision": "stage:mae"}, "config": {
        "text_config": TEXT, "vision_config": {**ENCODER, **clip.pop("vision", {})}, "projection_dim": 16,
    }}  # fmt: skip
    model |= clip.pop("model", {})
    return {
        "name": "two", "model": {"architecture": "vit_mae", "config": MAE}, "tokenizer": {"train_vocabulary_size": 330},
        "data": {"sources": {"captions": {"uri": "c.jsonl"}}},
        "stages": [
            {"name": "mae", "objective": "mae", "train": {"vision": {"lr": 1e-3}}, "mixture": {"weights": {"captions": 1.0}},
             "budget": {"steps": 2}},
            {"name": "clip", "objective": "clip", "train": {"vision": {"lr": 1e-3}}, "mixture": {"weights": {"captions": 1.0}},
             "budget": {"steps": 2}, "sequence_length": 16, "model": model, **clip},
            {"name": "more", "objective": "clip", "train": {"vision": {"lr": 1e-3}}, "mixture": {"weights": {"captions": 1.0}},
             "budget": {"steps": 2}, "sequence_length": 16},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "key", "told"),
    [
        ({"vision": {"hidden_size": 64}}, "model.init.vision", "64 hidden size here, 32 there"),
        ({"vision": {"num_attention_heads": 4}}, "model.init.vision", "4 attention heads here, 2 there"),
        ({"model": {"init": {"vision": "stage:more"}}}, "model.init.vision", "does not run before"),
        ({"model": {"init": {"vision": "stage:mea"}}}, "model.init.vision", "mae"),
        ({"model": {"init": {"language": "stage:mae"}}}, "model.init.language", "has no part language"),
        ({"start_from": "mae"}, "start_from", "model.init.vision: stage:mae"),
        ({"train": {"vision": {"lr": 1e-3, "optimizer_state": "keep"}}}, "train.vision.optimizer_state", "no optimizer state to keep"),
        ({"vision": {"image_size": 30}}, "model.config.vision_config.image_size", "no multiple of patch_size"),
    ],
)
def test_what_a_model_of_a_stage_cannot_take_is_refused_at_its_key(changed, key, told):
    problems = check(Recipe.model_validate(stages_of(**changed)))
    assert any(".".join(map(str, problem.path)) == f"stages.1.{key}" and told in problem.message for problem in problems), problems


def test_tensors_are_compared_before_the_first_stage_and_everybody_knows_whose_model_it_is():
    recipe = Recipe.model_validate(stages_of())
    assert check(recipe) == []
    check_taken(recipe)
    with pytest.raises(InputError, match=r"stage clip: .*activation of the vision part: gelu in the end of stage mae, .* has quick_gelu"):
        check_taken(Recipe.model_validate(stages_of(vision={"hidden_act": "quick_gelu"})))
    with pytest.raises(InputError, match=r"position_embedding.weight has shape \[5, 32\] in the end of stage mae, .* has \[17, 32\]"):
        check_taken(Recipe.model_validate(stages_of(vision={"image_size": 56})))
    check_taken(Recipe.model_validate(stages_of(vision={"image_size": 56}, model_changes={"interpolate_positions": 56})))

    assert [source_stage(recipe, number) for number in range(3)] == [None, "mae", "clip"]
    described = describe_recipe(recipe)["stages"]
    assert [(stage["model"], stage["starts_from"]) for stage in described] == [("vit_mae", None), ("clip", "mae"), ("clip", "clip")]
    graph = recipe.model_copy(update={"stage_order": "graph"})
    assert [waits_for(graph, number) for number in range(3)] == [set(), {"mae"}, {"clip"}]
    # What determines weights determines the hash: the encoder's stage and the model, not where its attention runs.
    other = Recipe.model_validate(stages_of(vision={"num_hidden_layers": 1}))
    longer = stages_of()
    longer["stages"][0]["budget"] = {"steps": 3}
    faster = stages_of(model={"attention": "sdpa_segments"})
    hashes = [[stage_hash(one, number) for number in range(3)] for one in (recipe, other, Recipe.model_validate(longer))]
    assert np.array_equal(np.array(hashes[0]) == np.array(hashes[1]), [True, False, False])
    assert not (np.array(hashes[0]) == np.array(hashes[2])).any()
    assert [stage_hash(Recipe.model_validate(faster), number) for number in range(3)] == hashes[0]
