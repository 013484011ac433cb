"""`terrace order RECIPE STAGE`: the first packs of a stage, without running it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from terrace.data.order.eligible import told_changes
from terrace.data.order.fixed import plan_of
from terrace.data.order.plan import StagePlan
from terrace.data.types import PackSpec
from terrace.errors import InputError
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import Recipe


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "order",
        help="list the first packs of a stage without running it",
        description="Each pack's samples, their lengths in tokens and the fill. The data is prepared if needed.",
    )
    parser.add_argument("recipe", type=Path, help="recipe file (YAML)")
    parser.add_argument("stage", help="name of the stage, or its number from 1")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--packs", type=int, default=8, metavar="N", help="how many packs (default 8)")
    parser.add_argument("--start", type=int, default=0, metavar="K", help="number of the first pack (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--run-dir", type=Path, help="use (or make) the data of this run")
    parser.add_argument("--workers", type=int, default=1, help="show to which of so many workers each pack is dealt")
    parser.set_defaults(main=order_command)


def order_command(args: argparse.Namespace) -> int:
    """Print packs `start` to `start + packs`, as many of them as the stage has."""
    from terrace.data.prepare import prepare_data, stage_data

    if args.packs < 1 or args.start < 0 or args.workers < 1:
        raise InputError("terrace order: --packs and --workers start at 1, --start at 0")
    recipe = load_recipe(args.recipe, args.overrides)
    stage_index = stage_number(recipe, args.stage)
    prepared = prepare_data(recipe, args.run_dir, progress=_progress)
    seen, prepared = stage_data(recipe, stage_index, prepared)
    plan = plan_of(seen, stage_index, prepared)
    found = order_facts(plan, args.start, args.packs, args.workers)
    print(json.dumps(found, ensure_ascii=False) if args.json else order_text(found))
    return 0


def stage_number(recipe: Recipe, named: str) -> int:
    """The index of a stage given by name or by number from 1."""
    names = [stage.name for stage in recipe.stages]
    if named in names:
        return names.index(named)
    if named.isdecimal() and 1 <= int(named) <= len(names):
        return int(named) - 1
    raise InputError(f"there is no stage {named!r} in recipe {recipe.name}; its stages are {', '.join(names)}")


def order_facts(plan: StagePlan, start: int, count: int, workers: int = 1) -> dict[str, Any]:
    """The packs as plain values for JSON: each one's samples with their tokens, and its fill."""
    length, batch = plan.stage.sequence_length, plan.stage.batch.packs
    stop = min(start + count, plan.total_steps * batch)
    ranks: dict[int, int] = {}
    for step in range(start // batch, -(-stop // batch)) if workers > 1 else ():
        for rank, hand in enumerate(plan.deal(step, workers)):
            ranks |= {pack.pack: rank for pack in hand}
    packs = [pack_facts(pack, length, batch) | ({"worker": ranks[pack.pack]} if ranks else {})
             for pack in plan.packs(start, stop)]  # fmt: skip
    tokens = sum(pack["tokens"] for pack in packs)
    return plan.explain() | {
        "sequence_length": length,
        "packs_per_step": batch,
        "total_steps": plan.total_steps,
        "fill": tokens / (len(packs) * length) if packs else 0.0,
        "packs": packs,
    }


def pack_facts(pack: PackSpec, sequence_length: int, batch: int) -> dict[str, Any]:
    samples = []
    for number, ref in enumerate(pack.samples):
        sample: dict[str, Any] = {
            "source": ref.source,
            "id": ref.id,
            "row": ref.row,
            "tokens": pack.lengths[number],
            "visual_tokens": pack.visual_tokens[number],
        }
        if pack.spans and pack.spans[number]:
            sample["span"] = list(pack.spans[number])
        if pack.pixels_max and pack.pixels_max[number]:
            sample["pixels_max"] = pack.pixels_max[number]
        samples.append(sample)
    tokens = sum(pack.lengths)
    return {
        "pack": pack.pack,
        "step": pack.pack // batch,
        "window": pack.window,
        "tokens": tokens,
        "visual_tokens": sum(pack.visual_tokens),
        "pixel_rows": pack.pixel_rows,
        "fill": tokens / sequence_length,
        "samples": samples,
    } | ({"pixels": list(pack.pixels)} if pack.pixels else {})


def order_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"stage {facts['stage']}: {facts['total_steps']} steps of {facts['packs_per_step']} packs of"
        f" {facts['sequence_length']} tokens; plan {facts['plan']}"
    ]
    for name, source in facts["sources"].items():
        changes = f"; {told}" if (told := told_changes(source["changes"])) else ""
        lines.append(
            f"  {name}: {source['samples_per_epoch']} samples an epoch, {source['mean_tokens']:.0f} tokens on average,"
            f" {source['share_of_samples']:.2%} of the samples{changes}"
        )
    for change in facts["changes"]:
        shares = ", ".join(f"{name} {share:.2%}" for name, share in change["share_of_samples"].items())
        lines.append(f"  from step {change['step']}: at most {change['pixels'][1]} pixels; {shares} of the samples")
    for pack in facts["packs"]:
        worker = f", worker {pack['worker']}" if "worker" in pack else ""
        lines.append(
            f"pack {pack['pack']} (step {pack['step']}{worker}): {pack['tokens']} tokens,"
            f" {pack['visual_tokens']} visual, fill {pack['fill']:.2%}"
        )
        for sample in pack["samples"]:
            span = f", tokens {sample['span'][0]} to {sample['span'][1]}" if "span" in sample else ""
            limit = f", at most {sample['pixels_max']} pixels" if "pixels_max" in sample else ""
            lines.append(f"    {sample['tokens']:>6}  {sample['source']}/{sample['id']}{span}{limit}")
    lines.append(f"fill of these {len(facts['packs'])} packs: {facts['fill']:.2%}")
    return "\n".join(lines)


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}: {done}/{total}\x1b[K", end="" if done < total else "\n", file=sys.stderr, flush=True)
