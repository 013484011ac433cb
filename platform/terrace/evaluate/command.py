"""`terrace evaluate MODEL SUITE...`: score a model directory on suites, or compare two evaluations."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from terrace.errors import InputError


def register(subparsers: argparse._SubParsersAction) -> None:
    evaluate = subparsers.add_parser(
        "evaluate",
        help="score a model on suites",
        description="Ask a model every question of the suites, judge the answers, and keep each of them beside the scores.",
        epilog="Kinds: mmbench:FILE.tsv; grounding, gui, counting, ocr, chart, caption and reasoning:FILE.jsonl; loss:RUN_DIR.",
    )
    evaluate.add_argument(
        "model", nargs="?", type=Path, help="model directory, for example RUN_DIR/stages/04-name/final"
    )
    evaluate.add_argument("suites", nargs="*", default=[], metavar="suite", help="KIND:PATH")
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where scores.json and answers.parquet go (default: MODEL/../evaluation)",
    )
    evaluate.add_argument("--limit", type=_count, metavar="N", help="only the first N questions of each suite")
    evaluate.add_argument("--json", action="store_true", help="print the scores as JSON")
    evaluate.add_argument(
        "--images-root",
        type=Path,
        metavar="DIR",
        help="folder that image paths start at (default: the file's, or the one above)",
    )
    evaluate.add_argument(
        "--max-new-tokens", type=_count, metavar="N", help="longest answer (default: each kind's own)"
    )
    evaluate.add_argument(
        "--batch-size", type=_count, default=16, metavar="N", help="prompts that are decoded together (16)"
    )
    evaluate.add_argument(
        "--workers",
        type=_count,
        default=1,
        metavar="N",
        help="processes, each with its own GPU where there are several (1)",
    )
    evaluate.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    evaluate.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    evaluate.add_argument(
        "--engine",
        choices=("native", "vllm"),
        default="native",
        help="what decodes (native); vllm, where it is installed, is for large models and tells no losses",
    )
    evaluate.add_argument(
        "--pixels",
        nargs=2,
        type=_count,
        metavar=("MIN", "MAX"),
        help="pixels of a resized image (default: the model's own); a loss compares only at one resolution",
    )
    evaluate.add_argument(
        "--vlmevalkit", type=Path, metavar="DIR", help="also write questions and answers as VLMEvalKit reads them"
    )
    evaluate.add_argument(
        "--compare", nargs=2, type=Path, metavar="DIR", help="compare two evaluations of the same suites instead"
    )
    evaluate.set_defaults(main=evaluate_command)


def evaluate_command(arguments: argparse.Namespace) -> int:
    if arguments.compare is not None:
        return _compare(arguments)
    if arguments.model is None or not arguments.suites:
        raise InputError(
            "name a model directory and at least one suite, for example: terrace evaluate MODEL mmbench:FILE.tsv"
        )
    from terrace.evaluate.replies import Settings
    from terrace.evaluate.run import evaluate_model, read_results

    settings = Settings(
        arguments.limit, arguments.images_root, arguments.max_new_tokens, arguments.batch_size, arguments.workers,
        arguments.device, arguments.precision, tuple(arguments.pixels) if arguments.pixels else None, arguments.engine,
    )  # fmt: skip
    out_dir = arguments.out or arguments.model.resolve().parent / "evaluation"
    scores = evaluate_model(
        arguments.model, arguments.suites, out_dir, settings, _show_progress if sys.stderr.isatty() else None
    )
    if arguments.vlmevalkit is not None:
        from terrace.evaluate.vlmevalkit import write_vlmevalkit

        name = arguments.model.resolve().name
        write_vlmevalkit(arguments.vlmevalkit, arguments.model, name, scores, read_results(out_dir)[1])
    print(json.dumps(scores, indent=1) if arguments.json else _table(scores, out_dir))
    return 0


def _show_progress(label: str, done: int, total: int) -> None:
    print(f"\r{label}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _table(scores: dict[str, Any], out_dir: Path) -> str:
    lines = [f"{'suite':<32} {'score':<20} {'value':>8}  {'95 % interval':<18} {'n':>6}"]
    for label, suite in scores["suites"].items():
        parts = [("", suite["scores"]), *((f"{name} ", named) for name, named in suite["categories"].items())]
        for prefix, named in parts:
            for name, score in named.items():
                interval = f"{score['low']:.3f} to {score['high']:.3f}"
                lines.append(
                    f"{label:<32} {prefix + name:<20} {score['value']:>8.3f}  {interval:<18} {score['count']:>6}"
                )
        for key, words in (
            ("not_judged", "answers could not be judged and are left out"),
            ("cut_off", "answers reached the length limit"),
        ):
            if suite[key]:
                lines.append(f"  {label}: {suite[key]} of {suite['cases']} {words}")
    return "\n".join([*lines, f"every answer: {out_dir / 'answers.parquet'}"])


def _compare(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from terrace.evaluate.compare import compare

    first, second = arguments.compare
    found = compare(first, second)
    if arguments.json:
        print(json.dumps([{**asdict(one), "clear": one.clear} for one in found], indent=1))
        return 0
    print(f"{'suite':<32} {'score':<20} {'first':>8} {'second':>8} {'change':>8}  95 % interval of the change")
    for one in found:
        verdict = "" if one.clear else "  (may be chance)"
        values = f"{one.first:>8.3f} {one.second:>8.3f} {one.difference:>+8.3f}"
        print(f"{one.suite:<32} {one.metric:<20} {values}  {one.low:+.3f} to {one.high:+.3f}{verdict}")
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
