"""Bytes that changed after indexing: a stage stops by name, or goes on with replacements that never depend on who reads."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from damage import flip
from stream_rows import captioned_pictures

from terrace.data.images import ImageDamage
from terrace.data.index.source_index import load_index, locate
from terrace.data.order.plan import StagePlan
from terrace.data.order.spares import SPARES
from terrace.data.prepare import PreparedData, data_mark, prepare_data
from terrace.data.stream.rank_stream import open_stream
from terrace.data.types import PackedExample
from terrace.errors import DamagedData
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.recipe.identity import stage_hash
from terrace.recipe.schema import Recipe

FAMILY = Qwen25VL()

STEPS, BATCH = 12, 6


def recipe_of(folder: Path, on_damage: str) -> Recipe:
    sources = {name: {"uri": str(folder / f"{name}.jsonl"), "on_damage": on_damage} for name in ("captions", "text")}
    sources["text"] |= {"kind": "text", "too_long": "split"}
    stage = {
        "name": "one", "train": {"projector": {"lr": 1e-3}}, "mixture": {"weights": {"captions": 0.7, "text": 0.3}},
        "sequence_length": 256, "pixels": {"min": 784, "max": 25_088}, "budget": {"steps": STEPS}, "batch": {"packs": BATCH},
        "data_loading": {"window_samples": 60, "packs_per_task": 4, "engine": "inline"},
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": "tiny", "model": {"config": {}}, "tokenizer": {"train_vocabulary_size": 400},
            "data": {"sources": sources, "shard_bytes": 2**18}, "stages": [stage],
        }
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """150 captioned pictures in several shards, and 40 texts, some longer than a pack."""
    random = np.random.default_rng(0)
    captions = captioned_pictures(tmp_path, 150, 200, random)
    texts = [{"id": f"t{n}", "text": " ".join(f"line{random.integers(90)}\n" for _ in range(20 + 4 * n))} for n in range(40)]
    for name, rows in (("captions", captions), ("text", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def prepared_and_plan(folder: Path, on_damage: str) -> tuple[PreparedData, StagePlan]:
    recipe = recipe_of(folder, on_damage)
    prepared = prepare_data(recipe, folder / "run", use_ray=False)
    return prepared, StagePlan.build(recipe, 0, prepared)


def packs_of(prepared: PreparedData, plan: StagePlan, workers: int = 1, start: int = 0) -> dict[int, PackedExample]:
    streams = [open_stream(plan, prepared, rank, workers, start) for rank in range(workers)]
    return {pack.pack: pack for stream in streams for step in stream for pack in step.packs}


def contents(packs: dict[int, PackedExample]) -> dict[int, tuple]:
    arrays = ("input_ids", "targets", "position_ids", "segment_ends", "pixels", "image_facts", "image_tokens", "image_rows")
    told = ("sample_ids", "sources", "kinds", "damaged", "replaced")
    return {
        number: (*(getattr(pack, name).tobytes() for name in arrays), *(str(getattr(pack, name)) for name in told))
        for number, pack in packs.items()
    }


def cut(prepared: PreparedData, source: str, share: float) -> set[str]:
    """Cut a source's first shard; returns the samples behind the cut."""
    index = prepared.indexes[source]
    path = Path(index.shards[0])
    length = int(path.stat().st_size * share)
    with path.open("r+b") as shard:
        shard.truncate(length)
    places = [index.location(row) for row in range(len(index))]
    return {f"{source}/{p.id}" for p in places if p.shard == str(path) and max(m[1] + m[2] for m in p.members) > length}


def test_damage_stops_the_stage_naming_shard_and_sample(folder: Path) -> None:
    prepared, plan = prepared_and_plan(folder, "stop")
    ref = plan.packs(10, 11)[0].samples[0]
    flip(prepared, ref.source, ref.row)
    shard = prepared.indexes[ref.source].location(ref.row).shard
    with pytest.raises(DamagedData, match=rf"source {ref.source}, sample {ref.id}, shard {shard}: the checksum of"):
        packs_of(prepared, plan)
    cut(prepared, "captions", 0.5)
    with pytest.raises(DamagedData, match=r"sample c\d+, shard .*the shard was cut"):
        packs_of(prepared, plan)


def test_replacements_are_the_same_for_everyone_who_reads(folder: Path) -> None:
    healthy = packs_of(*prepared_and_plan(folder, "stop"))
    prepared, plan = prepared_and_plan(folder, "skip")
    assert contents(packs_of(prepared, plan)) == contents(healthy)  # nothing is replaced while nothing is damaged
    lost = cut(prepared, "captions", 0.6)
    lost |= {flip(prepared, "text", row) for row in (7, 20, 33)}
    assert 10 < len(lost) < 80
    found = packs_of(prepared, plan)
    for workers, start in [(2, 0), (3, 5), (6, STEPS - 1)]:
        again = StagePlan.build(recipe_of(folder, "skip"), 0, prepared)
        again.restore(plan.state(start))
        expected = {number: pack for number, pack in contents(found).items() if number >= start * BATCH}
        assert contents(packs_of(prepared, again, workers, start)) == expected

    damaged = Counter(name for pack in found.values() for name in pack.damaged)
    assert set(damaged) <= lost
    assert len(damaged) > 8
    for number, pack in found.items():
        spec = plan.packs(number, number + 1)[0]
        wanted = [f"{ref.source}/{ref.id}" for ref in spec.samples]
        assert list(pack.damaged) == [name for name in wanted if name in lost]
        assert pack.replaced == len(pack.damaged)
        assert pack.sources == [ref.source for ref in spec.samples]  # of the same source, in the same place
        assert pack.tokens <= sum(spec.lengths)
        kept = [f"{source}/{sample}" for source, sample in zip(pack.sources, pack.sample_ids)]
        assert not lost & set(kept)
        assert all(now == before for now, before in zip(kept, wanted) if before not in lost)
        lengths = np.diff(pack.segment_ends, prepend=0)
        for place, before in enumerate(wanted):
            if before in lost:
                assert lengths[place] <= spec.lengths[place]
                assert lengths[place] > 0.5 * spec.lengths[place] or pack.sources[place] == "text"  # pieces of few long texts
    replaced = sum(pack.replaced for pack in found.values())
    assert sum(pack.tokens for pack in found.values()) > 0.97 * sum(pack.tokens for pack in healthy.values())
    stand_ins = Counter(
        (source, sample)
        for number, pack in found.items()
        for source, sample, before in zip(pack.sources, pack.sample_ids, (ref.id for ref in plan.packs(number, number + 1)[0].samples))
        if sample != before
    )
    assert stand_ins.total() == replaced
    assert stand_ins.most_common(1)[0][1] <= 3  # not one favourite everywhere


def test_damage_is_counted_in_the_metrics(folder: Path) -> None:
    from terrace.objectives.interface import Opening, StageFeed, StepExamples
    from terrace.objectives.lm import LanguageModelling
    from terrace.train.metrics import step_line
    from terrace.train.step import StepOutcome, count_batch
    from terrace.worker.context import WorkerContext

    prepared, plan = prepared_and_plan(folder, "skip")
    ref = plan.packs(BATCH, BATCH + 1)[0].samples[0]
    shortest = int(prepared.indexes["captions"].lengths((784, 25_088)).argmin())
    flip(prepared, ref.source, ref.row)
    flip(prepared, "captions", shortest)  # nothing may stand in for it
    lines = []
    feed = StageFeed(None, 0, lambda start: iter(()), plan.state, plan.restore)
    objective = LanguageModelling(Opening(plan.recipe, plan.stage, feed, WorkerContext(), folder))
    for step in open_stream(plan, prepared, 0, 1):
        counts = count_batch(objective, StepExamples(step.step, step.packs), ["captions", "text"], False, WorkerContext())
        assert counts.samples == sum(counts.samples_per_source.values()) == sum(len(pack.sample_ids) for pack in step.packs)
        lines.append(step_line(step.step + 1, counts, StepOutcome(1.0, 1.0, None), plan.stage, 1.0, 1.0, 0.0))
    assert lines[1]["replaced_samples"] == 1
    assert sum(line.get("damaged_samples", 0) for line in lines) > sum(line.get("replaced_samples", 0) for line in lines)
    assert any("damaged_samples" not in line for line in lines)


def test_an_image_that_only_the_decoder_refuses_is_replaced_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from terrace.data.stream import collate as module

    prepared, plan = prepared_and_plan(folder, "skip")
    bad = {plan.packs(number, number + 1)[0].samples[0].id for number in (3, 17)}
    real = module.make_segment

    def refusing(spec, number, loaded, *rest):
        if loaded.sample.id in bad:
            raise ImageDamage("truncated_image", "made up")
        return real(spec, number, loaded, *rest)

    monkeypatch.setattr(module, "make_segment", refusing)
    found = packs_of(prepared, plan)
    assert {name.partition("/")[2] for pack in found.values() for name in pack.damaged} == bad
    assert not bad & {sample for pack in found.values() for sample in pack.sample_ids}
    assert all(pack.replaced == len(pack.damaged) for pack in found.values())


def test_candidates_fit_and_where_nothing_fits_a_gap_is_left(folder: Path) -> None:
    prepared, plan = prepared_and_plan(folder, "skip")
    for spec in plan.packs(0, STEPS * BATCH):
        spares = plan.spares(spec)
        assert spares == plan.spares(replace(spec))
        for ref, length, visual_tokens, found in zip(spec.samples, spec.lengths, spec.visual_tokens, spares):
            assert len(found) <= SPARES
            assert len({(spare.row, spare.start) for spare in found}) == len(found)
            assert all(spare.length <= length and spare.visual_tokens <= visual_tokens for spare in found)
            assert not {spare.row for spare in found} & {other.row for other in spec.samples if other.source == ref.source}
    index = prepared.indexes["captions"]
    shortest = int(index.lengths((784, 25_088)).argmin())
    lost = flip(prepared, "captions", shortest)
    found = [pack for pack in packs_of(prepared, plan).values() if pack.damaged]
    assert all(pack.damaged == (lost,) and lost.partition("/")[2] not in pack.sample_ids for pack in found)
    assert found
    assert found[0].replaced == 0


def test_a_row_is_found_without_its_index(folder: Path) -> None:
    prepared, _ = prepared_and_plan(folder, "skip")
    for index in prepared.indexes.values():
        fresh = load_index(index.folder, FAMILY)
        for row in (0, 1, len(index) // 2, len(index) - 1):
            assert locate(index.folder, row) == fresh.location(row)


def test_a_stage_that_damage_stopped_may_go_on_with_skip(folder: Path) -> None:
    stop, skip = recipe_of(folder, "stop"), recipe_of(folder, "skip")
    assert stage_hash(stop, 0) == stage_hash(skip, 0)
    assert data_mark(stop) == data_mark(skip)
    prepared, plan = prepared_and_plan(folder, "stop")
    assert plan.fingerprint == StagePlan.build(skip, 0, prepared).fingerprint
