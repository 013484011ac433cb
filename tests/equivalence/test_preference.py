"""Stages that compare answers: equal to the formula over separate sequences, resumed and spread alike, and they learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rl_stage
import torch
import torch.nn.functional as F
from processes import run_ranks
from rl_stage import figures_of, pair_recipe, run, write_pairs

from terrace.data.prepare import load_prepared, prepare_data
from terrace.data.types import PackedExample, following_positions
from terrace.errors import Preempted
from terrace.models.batch import to_device
from terrace.models.build import build_model
from terrace.models.forward import pack_logits_hidden
from terrace.objectives import preference_losses as formulas
from terrace.objectives import reference
from terrace.objectives.dpo import Dpo
from terrace.objectives.interface import Opening, StageRun
from terrace.objectives.kto import Kto
from terrace.objectives.mpo import Mpo
from terrace.objectives.orpo import Orpo
from terrace.objectives.simpo import Simpo
from terrace.recipe.schema import Recipe
from terrace.rl.answer_feed import open_feed
from terrace.train.setup import prepare_strategy
from terrace.worker.context import WorkerContext

SEED = 0  # under which the moved policy's divergence, which kto clamps at 0, is above it
OBJECTIVES = {"dpo": Dpo, "mpo": Mpo, "kto": Kto, "orpo": Orpo, "simpo": Simpo}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, half of them with a picture, and beside them single answers with a label."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("preference")
    write_pairs(place)
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    labelled = []
    for number, row in enumerate(rows):
        rejected = row.pop("rejected_response")
        if number % 2:
            row["messages"][-1]["content"] = rejected
        labelled.append({**row, "label": number % 2 == 0})
    (place / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    prepare_data(recipe_of(place, "kto"), place, use_ray=False)
    return place


def recipe_of(folder: Path, objective: str, steps: int = 4, **stage: Any) -> Recipe:
    values = pair_recipe(folder, steps=steps, objective=objective, **stage).model_dump(mode="json")
    values["data"]["sources"]["labelled"] = {"uri": str(folder / "labelled.jsonl"), "kind": "preference", "holdout_samples": 4}
    if objective == "kto":
        values["stages"][0]["mixture"]["weights"] = {"pairs": 1.0, "labelled": 1.0}
    return Recipe.model_validate(values)


class Alone:
    """The strategy as the objective knows it, of one process without a wrapper."""

    def __init__(self, model: Any, objective: Any) -> None:
        self.model, self._objective = model, objective

    def loss(self, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return self._objective.loss(self.model, batch)


def sequence_logprob(model: Any, pair: Any, answer: np.ndarray) -> tuple[torch.Tensor, int]:
    """log p(answer | prompt) of one sequence on its own, by plain segment attention."""
    prompt, length = pair.prompt, len(pair.prompt.input_ids)
    fed = answer[:-1]
    ids = np.concatenate([prompt.input_ids, fed]).astype(np.int32)
    positions = np.concatenate([prompt.positions, following_positions(prompt.positions, len(fed))], axis=1).astype(np.int32)
    example = PackedExample(
        pack=0, input_ids=ids, targets=np.full(len(ids), -100, np.int32), position_ids=positions,
        segment_ends=np.asarray([len(ids)], np.int32), pixels=prompt.pixels, image_facts=prompt.image_facts,
        image_tokens=prompt.image_tokens, image_rows=prompt.image_rows, sample_ids=[prompt.id], sources=["x"], kinds=["prompt"],
        sequence_length=len(ids),
    )  # fmt: skip
    logits, _ = pack_logits_hidden(model, to_device(example, "cpu", torch.float32))
    logged = torch.log_softmax(logits[length - 1 :].float(), dim=1)
    return logged[torch.arange(len(answer)), torch.from_numpy(answer.astype(np.int64))].sum(), len(answer)


def formula(name: str, policy: Any, first: Any, pairs: list[Any]) -> torch.Tensor:
    """The loss of a batch with the recipe's defaults, of one sequence at a time."""

    def both(pair: Any, answer: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
        value, tokens = sequence_logprob(policy, pair, answer)
        with torch.no_grad():
            return value, sequence_logprob(first, pair, answer)[0], tokens

    if name == "kto":
        others = [both(pair, pair.other) for pair in pairs]
        divergence = max(0.0, sum(float(value.detach() - old) for value, old, _ in others) / len(others))
        found = []
        for pair in pairs:
            for answer, wanted in zip(pair.answers, pair.wanted):
                value, old, _ = both(pair, answer)
                sign = 1 if wanted else -1
                found.append(1 - torch.sigmoid(0.1 * sign * (value - old - divergence)))
        return torch.stack(found).mean()
    total, likelihood, tokens = torch.zeros(()), torch.zeros(()), 0
    for pair in pairs:
        (chosen, chosen_old, long), (rejected, rejected_old, short) = (both(pair, answer) for answer in pair.answers)
        likelihood, tokens = likelihood - chosen, tokens + long
        delta = 0.1 * (chosen - chosen_old - rejected + rejected_old)
        if name == "dpo":
            total = total - F.logsigmoid(delta)
        elif name == "mpo":
            classified = -F.logsigmoid(0.1 * (chosen - chosen_old)) - F.logsigmoid(-0.1 * (rejected - rejected_old))
            total = total - 0.8 * F.logsigmoid(delta) + 0.2 * classified
        elif name == "orpo":
            total = total + formulas.orpo_losses((chosen / long)[None], (rejected / short)[None], 0.1)[0]
        else:
            total = total - F.logsigmoid(2.0 * (chosen / long - rejected / short) - 1.0)
    share = 1.0 if name in ("mpo", "orpo") else 0.0
    return total / len(pairs) + share * likelihood / tokens


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("mpo", "kto") else pytest.mark.slow) for name in OBJECTIVES])
def test_value_and_gradients_are_those_of_separate_sequences(folder, name):
    """In packs of several units, cut into three examples and with an empty one between, with a policy that has moved."""
    recipe = recipe_of(folder, name, sequence_length=256)
    stage, prepared, context = recipe.stages[0], load_prepared(folder / "data"), WorkerContext()
    feed = open_feed(recipe, 0, prepared, context)
    first, policy = (build_model(recipe.model, feed.config) for _ in range(2))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for _, parameter in sorted(policy.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    objective = OBJECTIVES[name](Opening(recipe, stage, feed, context, folder / f"value-{name}"))
    objective.begin(StageRun(Alone(first, objective), lambda *_: None, lambda *_: None))
    objective._make_reference(lambda: None)
    objective.begin(StageRun(Alone(policy, objective), lambda *_: None, lambda *_: None))
    [taken] = [next(iter(feed.stream(0)))]
    examples = [taken.examples[0], objective.empty(), *taken.examples[1:]]
    assert len(examples) > 2
    assert any(len(pack.names) > 1 for pack in examples)
    divisor = sum(objective.weight(pack) for pack in examples)
    objective.before(examples, 1 / divisor)
    assert name != "kto" or objective._divergence > 0
    value = sum(objective.loss(policy, objective.batch(pack)) for pack in examples) / divisor
    value.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in policy.named_parameters() if parameter.grad is not None}
    policy.zero_grad(set_to_none=True)
    again = open_feed(recipe, 0, prepared, context)
    pairs: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("terrace.rl.pair_feed.pack_pairs", lambda drawn, _: pairs.extend(drawn) or [])
        next(iter(again.stream(0)))
    assert len(pairs) == 8
    assert {bool(pair.prompt.images) for pair in pairs} == {True, False}
    expected = formula(name, policy, first, pairs)
    expected.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-7)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, parameter in policy.named_parameters():
        if key in gradients and parameter.grad is not None:
            torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-6 * largest, msg=key)


def test_killed_anywhere_ends_with_the_same_bits(folder, monkeypatch):
    """While the reference is computed, before the first checkpoint and after one; the reference is not computed again after it."""
    monkeypatch.setattr(reference, "BLOCK", 8)
    recipe = recipe_of(folder, "kto", checkpoint={"every_steps": 1}, evaluate={"every_steps": 2, "max_samples_per_kind": 4})
    whole = run(recipe, folder, "whole")
    real, blocks = reference.write_durably, []

    def third_is_the_last(path: Path, content: bytes) -> None:
        if len(blocks) == 3:
            raise KeyboardInterrupt
        blocks.append(path)
        real(path, content)

    monkeypatch.setattr(reference, "write_durably", third_is_the_last)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder, "killed")
    assert [path.name for path in blocks] == [f"{number:08d}.json" for number in range(3)]
    monkeypatch.setattr(reference, "write_durably", lambda path, content: (blocks.append(path), real(path, content)))
    asked = iter(range(100))
    with pytest.raises(Preempted):
        run(recipe, folder, "killed", should_stop=lambda: "told" if next(asked) >= 1 else None)
    assert len(blocks) == len(set(blocks)) > 3, "a finished block is not computed again"
    count = len(blocks)
    reference.forget(folder / "killed" / "reference")
    assert run(recipe, folder, "killed").evaluation == whole.evaluation
    assert len(blocks) == count, "the table of the checkpoint is used"
    assert figures_of(folder, "killed") == figures_of(folder, "whole")
    final = "final/model.safetensors"
    assert (folder / "killed" / final).read_bytes() == (folder / "whole" / final).read_bytes()
    assert not (folder / "whole" / "reference").exists()
    line = figures_of(folder, "whole")[-1]
    assert {"accuracy", "margin", "divergence", "chosen_logprob", "rejected_logprob", "chosen_tokens", "rejected_tokens"} <= set(line)
    changed = recipe_of(folder, "kto", kto={"beta": 0.2}, checkpoint={"every_steps": 1})
    assert run(changed, folder, "changed").loss != whole.loss


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_layout_gives_the_losses_of_one_process(folder):
    jobs = [(name, strategy, 2) for name in OBJECTIVES for strategy in ("ddp", "fsdp", "zero2", "zero3")]
    jobs += [(name, "ddp", 4) for name in OBJECTIVES]
    for name in OBJECTIVES:
        run(recipe_of(folder, name, steps=3), folder, f"{name}-one")
    for ranks in (2, 4):
        recipes = {f"{name}-{strategy}-{ranks}": recipe_of(folder, name, steps=3, parallel={"strategy": strategy}).model_dump(mode="json")
                   for name, strategy, wanted in jobs if wanted == ranks}  # fmt: skip
        run_ranks(ranks, run_each, recipes, str(folder), timeout=900)
    for name, strategy, ranks in jobs:
        found = figures_of(folder, f"{name}-{strategy}-{ranks}")
        for line, expected in zip(found, figures_of(folder, f"{name}-one"), strict=True):
            for key in ("loss", "accuracy", "margin", "chosen_logprob", "grad_norm"):
                assert line[key] == pytest.approx(expected[key], rel=2e-4, abs=2e-5), (name, strategy, key)
            assert line["samples"] == expected["samples"]


def run_each(rank: int, world_size: int, jobs: dict[str, Any], folder: str) -> None:
    for name, values in jobs.items():
        rl_stage.run_rank(rank, world_size, values, folder, name)


@pytest.mark.slow
def test_every_comparing_objective_resumes_to_the_same_bits(folder):
    for name in OBJECTIVES:
        recipe = recipe_of(folder, name, checkpoint={"every_steps": 1})
        run(recipe, folder, f"uninterrupted-{name}")
        for _ in range(3):
            with pytest.raises(Preempted):
                run(recipe, folder, f"stopped-{name}", should_stop=lambda: "told")
        run(recipe, folder, f"stopped-{name}")
        assert figures_of(folder, f"stopped-{name}") == figures_of(folder, f"uninterrupted-{name}"), name
        final = "final/model.safetensors"
        assert (folder / f"stopped-{name}" / final).read_bytes() == (folder / f"uninterrupted-{name}" / final).read_bytes(), name


@pytest.mark.slow
def test_every_comparing_objective_trains(folder):
    """Two steps each and the pairs already tell: the chosen answers' advantage grows."""
    for name in OBJECTIVES:
        result = run(recipe_of(folder, name, steps=3), folder, f"trains-{name}")
        before, after = result.evaluation["before"], result.evaluation["after"]
        assert after["preference/loss"] < before["preference/loss"], name
        assert after["preference/margin"] > before["preference/margin"], name


def test_rows_that_an_objective_cannot_read_are_refused_by_name(folder):
    from terrace.errors import InputError

    values = recipe_of(folder, "dpo").model_dump(mode="json")
    values["stages"][0]["mixture"]["weights"] = {"labelled": 1.0}
    recipe = Recipe.model_validate(values)
    feed = open_feed(recipe, 0, load_prepared(folder / "data"), WorkerContext())
    with pytest.raises(InputError, match=r"source labelled, sample .*rows with a `label` are for objective kto"):
        next(iter(feed.stream(0)))
    table = reference.ReferenceTable()
    with pytest.raises(Exception, match="labelled/3/x: there is no reference log-probability"):
        table._row("labelled/3/x")


def test_the_strategy_wraps_an_objective_before_its_reference_exists(folder):
    """An empty table is no table: `load` fills it, and only `load` and the first weights do."""
    recipe = recipe_of(folder, "dpo")
    context = WorkerContext()
    feed = open_feed(recipe, 0, load_prepared(folder / "data"), context)
    objective = Dpo(Opening(recipe, recipe.stages[0], feed, context, folder / "wrapped"))
    strategy = prepare_strategy(recipe.model, recipe.stages[0], feed.config, context, objective.loss)
    objective.begin(StageRun(strategy, lambda *_: None, lambda *_: None))
    assert list(objective.state()) == []
    objective._make_reference(lambda: None)
    kept = dict(objective.state())
    other = Dpo(Opening(recipe, recipe.stages[0], feed, context, folder / "wrapped"))
    other.load(lambda name: kept[name])
    assert {key: tensor.tolist() for key, tensor in other.state()}["reference/names"] == kept["reference/names"].tolist()
    assert (folder / "wrapped" / "reference").is_dir()
