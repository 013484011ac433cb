"""A training step of `clip` beside open_clip's own, and of `dpo` beside TRL's DPOTrainer, on the same weights and batches. On CPU.

    make bench-objectives ARGS="--open-clip DIR --trl DIR"   # about 8 minutes on two idle cores
    make bench-objectives ARGS="--only clip"                 # without DIR: Terrace alone

DIR are folders of their own, made with the package index:
    pip install --target OPEN_CLIP --no-deps open_clip_torch timm ftfy "torchvision==0.28.*"
    pip install --target TRL "trl==1.16.*" "torchvision==0.28.*" --no-deps     # and what `pip install -e '.[bench]'` has besides

Losses of both sides are compared in the same run, and a run whose losses disagree is no measurement. Seconds of a machine that others
use are none either: the load is told before and during, and the table is written (--table FILE, else printed) only where it was quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

HIGHEST_DIFFERENCE = {"clip": 1e-5, "dpo": 1e-3}  # of losses, as a share; TRL's steps drift apart by rounding
AIMS = {"clip": 1.05, "dpo": 0.6}


def clip_rows(args: argparse.Namespace) -> list[list[str]]:
    """Lines of the table, one for each shape."""
    from objective_clip import SHAPES, measure

    rows = []
    for name in args.shapes or SHAPES:
        steps = args.steps or (40 if name == "tiny" else 8)
        found = measure(name, args.open_clip, steps, args.packs)
        print(json.dumps({"clip": name} | found), flush=True)
        row = [f"`clip`, {name}, {args.packs} x {SHAPES[name].pairs} pairs", f"{found['terrace_seconds']:.3f}"]
        if args.open_clip:
            # open_clip adds the scale's slope once for each of several packs
            checked(f"clip, {name}", found["loss_difference"], HIGHEST_DIFFERENCE["clip"] if args.packs == 1 else 1.0)
            row += [f"{found['open_clip_seconds']:.3f}", f"{found['ratio']:.2f}", f"at most {AIMS['clip']}"]
        rows.append(row)
    return rows


def dpo_rows(args: argparse.Namespace) -> list[list[str]]:
    from objective_dpo import measure

    found = measure(args, __file__)
    print(json.dumps({"dpo": found}), flush=True)
    ours, theirs = found["terrace"], found.get("trl")
    side = round(args.pixels**0.5)
    shape = f"{args.pairs} pairs of {args.words} words about {side} x {side} pixels"
    row = [f"`dpo`, {shape}, the reference in it", f"{ours['step_seconds']:.3f}"]
    if theirs:
        both = [pair for key in ("loss", "chosen_logprob") for pair in zip(ours[key], theirs[key], strict=True)]
        checked("dpo", max(abs(a - b) / max(abs(b), 1.0) for a, b in both), HIGHEST_DIFFERENCE["dpo"])
        ratio, processor = (ours[name] / theirs[name] for name in ("step_seconds", "processor_seconds"))
        print(f"dpo: Terrace takes {ratio:.2f} of TRL's time, {processor:.2f} of its processor time", flush=True)
        row += [f"{theirs['step_seconds']:.3f}", f"{ratio:.2f}", f"at most {AIMS['dpo']}"]
    return [row]


def checked(what: str, difference: float, highest: float) -> None:
    print(f"{what}: losses of both sides are at most {difference:.1e} of themselves apart", flush=True)
    if not difference <= highest:
        raise SystemExit(f"{what}: the losses differ by more than {highest:.0e} of themselves, so the two do not do the same: no table")


def table_of(rows: list[list[str]]) -> str:
    head = ["a step of", "Terrace, s", "the other, s", "Terrace over it", "aim"][: max(map(len, rows))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def main(arguments: list[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["clip", "dpo"])
    parser.add_argument("--open-clip", help="folder with open_clip (see above)")
    parser.add_argument("--trl", help="folder with TRL (see above)")
    parser.add_argument("--steps", type=int, help="measured steps (2 more come first)")
    parser.add_argument("--shapes", nargs="*", help="of clip: tiny, vit-b-32, ...; default all")
    parser.add_argument("--packs", type=int, default=1, help="clip: packs of a step; several run twice each, on both sides")
    parser.add_argument("--pairs", type=int, default=4, help="dpo: pairs of a step")
    parser.add_argument("--words", type=int, default=48, help="dpo: words of an answer")
    parser.add_argument("--pixels", type=int, default=200_704, help="dpo: of a picture")
    parser.add_argument("--rounds", type=int, default=3, help="dpo: how often each side runs, in turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", type=Path, help="write the table into this file")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.given, args.dpo_steps = sys.argv[1:] if arguments is None else arguments, args.steps or 14
    if args.run:
        from objective_dpo import KINDS

        print("RESULT " + json.dumps(KINDS[args.run](args.folder, args)))
        return []
    import torch
    from machine_load import Watch

    torch.set_num_threads(args.threads)
    watch = Watch()
    measured: dict[str, Any] = {"clip": clip_rows, "dpo": dpo_rows}
    rows = [row for name, rows_of in measured.items() if args.only in (None, name) for row in rows_of(args)]
    load = watch.end()
    print(load)
    if not load.quiet:
        print("The machine was not quiet, so there is no table; the figures above are of a run beside other work.")
        if args.table:
            raise SystemExit(f"{args.table} is not written")
        return rows
    if args.table:
        args.table.write_text(table_of(rows))
    print(table_of(rows), end="")
    return rows


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
