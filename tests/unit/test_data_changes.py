"""A stage whose resolution and mixture change inside: every pack is of its stretch, nothing is lost or repeated at a change, and a
checkpoint of any step goes on with the same packs on any number of workers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from formula_source import FormulaSource, seen, stage
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.data.order.balance import CostModel
from terrace.data.order.items import Items
from terrace.data.order.plan import StagePlan
from terrace.planner.plan import make_plan
from terrace.recipe.errors import RecipeError
from terrace.recipe.identity import stage_hash
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import Stage
from terrace.recipe.stretches import last_stretch, stretches

SMALL, LARGE = {"min": 1, "max": 50_176}, {"min": 1, "max": 240_100}
CHANGES = [
    {"step": 7, "pixels": LARGE},
    {"step": 16, "weights": {"a": 1.0, "b": 0.0, "c": 3.0}},
    {"step": 17, "pixels": SMALL, "weights": {"b": 1.0}},
]
WEIGHTS = {"weights": {"a": 0.7, "b": 0.3, "c": 0.0}}


@dataclass
class Longer(FormulaSource):
    """The same rows at a higher resolution: every sample has more tokens."""

    more: int = 60

    def take(self, numbers: np.ndarray) -> Items:
        items = super().take(numbers)
        return Items(items.rows, items.lengths + self.more, *(getattr(items, name) for name in list(Items.__dataclass_fields__)[2:]))


def sources(kind: type[FormulaSource], **counts: int) -> dict[str, FormulaSource]:
    sizes = {"a": 500, "b": 90, "c": 40} | counts
    return {name: kind(name, count) for name, count in sizes.items()}


def changing(later_counts: dict[str, int] | None = None, **values: object) -> StagePlan:
    described = stage(**{"mixture": WEIGHTS, "pixels": SMALL, "changes": CHANGES, **values})
    large = sources(Longer, **(later_counts or {}))
    by_pixels = {50_176: sources(FormulaSource), 240_100: large}
    later = [by_pixels[part.pixels.max] for _, part in stretches(described)[1:]]
    return StagePlan(described, sources(FormulaSource), 0, CostModel(), later=later)


@settings(max_examples=15, deadline=None)
@given(st.integers(5, 400), st.integers(1, 24), st.sets(st.integers(1, 29), min_size=1, max_size=4))
def test_nothing_is_lost_or_repeated_at_a_change(window: int, batch: int, steps: set[int]) -> None:
    """Before a change and before the next, every source has given whole passes and a part of one, no row twice in it."""
    changes = [{"step": step, "weights": {"a": 1.0 + number, "b": 2.0}} for number, step in enumerate(sorted(steps))]
    made = changing(changes=changes, data_loading={"window_samples": window}, batch={"packs": batch})
    given_so_far: Counter[tuple[str, int]] = Counter()
    bounds = [0, *(change["step"] * batch for change in changes)]
    for start, stop in pairwise(bounds):
        packs = made.packs(start, stop)
        assert [pack.pack for pack in packs] == list(range(start, stop))
        assert all(pack.samples and sum(pack.lengths) <= 1024 for pack in packs)
        given_so_far += seen(packs)
        for source in made.sources[:2]:
            counts = [given_so_far[source.name, row] for row in range(source.count)]
            assert max(counts) - min(counts) <= 1
        stretch = next(stretch for stretch in made.stretches if stretch.stop_pack == stop)
        here, total = seen(packs), sum(stretch.weights.values())
        samples = sum(here.values())
        for name, weight in stretch.weights.items():
            assert abs(sum(count for (source, _), count in here.items() if source == name) - samples * weight / total) < 1


def test_every_pack_is_of_its_stretch() -> None:
    made, batch = changing(), 14
    packs = made.packs(0, 30 * batch)
    assert [pack.pixels for pack in packs] == [(1, 240_100) if 7 <= pack.pack // batch < 17 else None for pack in packs]
    assert {ref.source for pack in packs[: 16 * batch] for ref in pack.samples} == {"a", "b"}
    assert {ref.source for pack in packs[16 * batch : 17 * batch] for ref in pack.samples} == {"a", "c"}
    assert {ref.source for pack in packs[17 * batch :] for ref in pack.samples} == {"a", "b", "c"}
    shares = [change["share_of_samples"] for change in made.explain()["changes"]]
    assert shares[1:] == [{"a": 0.25, "b": 0.0, "c": 0.75}, {"a": 0.2, "b": 0.2, "c": 0.6}]
    fills = [sum(pack.lengths) / 1024 for pack in packs]
    assert np.mean(fills) > 0.97, "the windows before a change are small, and waste a pack at most"


@pytest.mark.parametrize("counts", [{}, {"a": 450}], ids=["the same samples", "fewer fit"])
def test_every_step_resumes_to_the_same_packs_on_any_number_of_workers(counts: dict[str, int]) -> None:
    made = changing(counts)
    for step in range(30):
        state = json.loads(json.dumps(made.state(step)))
        assert len(json.dumps(state)) < 300
        other = changing(counts)
        other.restore(state)
        rest = range(step, min(step + 3, 30))
        assert [other.packs_of_step(later) for later in rest] == [made.packs_of_step(later) for later in rest]
        for world in (1, 2, 7):
            hands = other.deal(step, world)
            assert sorted((pack for hand in hands for pack in hand), key=lambda pack: pack.pack) == made.packs_of_step(step)
        assert other.state(step) == state
    again = changing(counts)
    again.restore(made.state(25))  # and back: what lies before is walked to
    assert again.packs_of_step(3) == made.packs_of_step(3)
    assert again.packs_of_step(20) == made.packs_of_step(20)


def test_a_source_whose_samples_differ_begins_a_new_pass() -> None:
    made = changing({"a": 450})
    made.packs(0, 30 * 14)
    first, second, third, _ = made.stretches
    assert first.drawn == (0, 0, 0)
    assert second.drawn[0] == 0, "450 of 500 fit: another permutation"
    assert second.drawn[1] > 0, "the same 90 rows: it goes on"
    assert third.drawn[0] > 0


def test_the_state_of_a_stage_without_changes_is_as_before() -> None:
    plain = StagePlan(stage(), {"a": FormulaSource("a", 500), "b": FormulaSource("b", 90)}, 0, CostModel())
    assert set(plain.state(3)) == {"version", "plan", "step", "pack", "window", "window_first_pack", "window_position"}
    assert plain.fingerprint != changing().fingerprint


def test_a_checkpoint_of_other_changes_is_refused() -> None:
    with pytest.raises(Exception, match="the checkpoint's data order"):
        changing(changes=CHANGES[:1]).restore(changing().state(20))


# ---------------------------------------------------------------- the recipe

BASE = ["stages.visual-instruction-tuning.budget={steps: 100}"]
WRONG = [
    ("[{step: 100, weights: {mix: 2}}]", "100 is not before the end of the stage's 100 steps"),
    ("[{step: 9, weights: {mix: 2}}, {step: 9, weights: {mix: 1}}]", "9 does not come after the change before it, at 9"),
    ("[{step: 9}]", "changes nothing; give pixels, weights or both"),
    ("[{step: 9, weights: {mis: 2}}]", "`mis` is not in the stage's mixture; did you mean `mix`?; name it there, with weight 0"),
    ("[{step: 9, weights: {mix: 0}}]", "leaves no source with a weight above 0"),
    ("[{step: 0, weights: {mix: 2}}]", "greater than or equal to 1"),
    ("[{step: 9, pixels: {min: 5, max: 2}}]", "changes.0"),
    ("[{step: 9, weight: {mix: 2}}]", "unknown key"),
]


@pytest.mark.parametrize(("written", "said"), WRONG)
def test_changes_that_cannot_be_are_refused_at_their_place(written: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("llava-1.5-7b", [*BASE, f"stages.visual-instruction-tuning.changes={written}"])
    assert said in str(caught.value)
    assert "stages.1.changes" in str(caught.value)


def test_what_changes_do_not_go_with_is_refused() -> None:
    changes = "stages.1.changes=[{step: 2, weights: {mix: 2}}]"
    for overrides, said in (
        ([changes, "stages.1.budget={samples: 100}"], "a budget in steps or tokens"),
        ([*BASE, changes, "stages.1.mixture={weights: {mix: 1}, epoch_caps: {mix: 2}}"], "cannot stand beside changes"),
        ([*BASE, "stages.1.mixture={mix: 1, pretrain: 0}"], "has weight 0 and no change of the stage raises it"),
        ([*BASE, "stages.1.mixture={mix: 0}", changes], "no source with a weight above 0 at the stage's beginning"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe("llava-1.5-7b", overrides)
    with pytest.raises(RecipeError, match="only stages that train on packs may change inside"):
        load_recipe("mimo-vl-7b-rl", ["stages.morl.changes=[{step: 2, weights: {rl-chat: 2}}]"])


def test_the_plan_and_the_hash_know_the_changes() -> None:
    """FLOPs are those of each stretch; the hash of a stage without changes is the one it had."""
    plain = load_recipe("qwen2-vl-7b", ["stages.1.budget={steps: 100}"])
    changes = "[{step: 25, weights: {captions: 0, text: 1}, pixels: {min: 3136, max: 100352}}]"
    changed = load_recipe("qwen2-vl-7b", ["stages.1.budget={steps: 100}", f"stages.1.changes={changes}"])
    end = plain.model_copy(update={"stages": [plain.stages[0], last_stretch(changed.stages[1]), plain.stages[2]]})
    start, mixed, final = (make_plan(recipe).stages[1] for recipe in (plain, changed, end))
    assert mixed.pack_flops.model == pytest.approx(0.25 * start.pack_flops.model + 0.75 * final.pack_flops.model, rel=1e-9)
    assert mixed.work.steps == 100
    assert mixed.work.sources["captions"].samples == pytest.approx(0.25 * (start.work.sources["captions"].samples or 0))
    assert sum(source.share for source in mixed.work.sources.values()) == pytest.approx(1)
    assert stage_hash(plain, 1) != stage_hash(changed, 1)
    assert stage_hash(plain, 0) == stage_hash(changed, 0)
    assert isinstance(changed.stages[1], Stage)
