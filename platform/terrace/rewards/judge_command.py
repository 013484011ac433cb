"""`terrace judge RECIPE|RULE ROWS`: what a reward gives for given responses, and why, before a stage is paid for."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from terrace.errors import InputError

EVERY_ROW = "-"


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "judge",
        help="score given responses and say why",
        description="Score the responses in a file with a rule, or with the rewards of a recipe's stage; say for each what was read as "
        "its answer and which rule decided; sum up per family, with timings.",
        epilog="Exit status 1 with --expect where a verdict differs from the row's `right`.",
    )
    parser.add_argument("reward", help="recipe file, or a rule: counting, math, package.module:function; - where each row names its `rule`")
    parser.add_argument("rows", type=Path, help="JSON Lines: response (or responses), solution, task, and what the rule needs")
    parser.add_argument("overrides", nargs="*", default=[], help="key.path=value, of a recipe")
    parser.add_argument("--stage", help="recipe: stage name; default: the only one with rewards")
    parser.add_argument(
        "--options", type=_options, default={}, metavar="JSON", help="options of the rule, for example '{\"partial\": true}'"
    )
    parser.add_argument(
        "--solutions", action="store_true", help="judge each row's own solution, stated as a response would: all must earn 1"
    )
    parser.add_argument("--expect", action="store_true", help="compare with each row's `right` (also `expect`); show only what differs")
    parser.add_argument("--summary", action="store_true", help="print no rows, only the summary")
    parser.add_argument("--json", action="store_true", help="print rows as JSON Lines and no summary")
    parser.add_argument("--sandbox-workers", type=int, default=2, metavar="N", help="killable processes (2)")
    parser.add_argument("--item-seconds", type=float, default=5.0, metavar="S", help="time limit of one response (5)")
    parser.set_defaults(main=main)


def _options(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("it is not a JSON object")
    return value


def main(args: argparse.Namespace) -> int:
    """Judge and print; 1 if --expect or --solutions finds a verdict that is not the expected one."""
    from terrace.rewards import judging
    from terrace.rewards.router import Router
    from terrace.rewards.sandbox import SandboxPool

    rewards = _rewards(args)
    asked = judging.asked_rows(args.rows, rewards, args.solutions)
    if args.expect and all(one.expected is None for one in asked):
        raise InputError(f"{args.rows}: --expect compares with `right` (or `expect`), which no row has")
    with SandboxPool(args.sandbox_workers, args.item_seconds) as pool:
        router = Router(rewards, pool)
        try:
            scores = router.score([(one.task, one.item) for one in asked])
        finally:
            router.close()
        held = pool.held
    rows = judging.judged_rows(asked, scores)
    if args.solutions:
        rows = [replace(row, expected=1.0) for row in rows]
    comparing = args.expect or args.solutions
    differing = [row for row in rows if not row.agrees]
    if not args.summary:
        for row in differing if comparing else rows:
            print(judging.row_json(row) if args.json else judging.row_text(row))
    if not args.json:
        print(judging.summary_text(judging.summaries(rows), comparing))
        print(f"sandbox: {', '.join(held) or 'not used'}")
    return 1 if comparing and differing else 0


def _rewards(args: argparse.Namespace) -> dict[str, Any]:
    """Task -> rules: of a recipe's stage, of one rule, or of the rules that the rows name."""
    from terrace.recipe.schema_grpo import RewardRule
    from terrace.rewards.command import stage_with_rewards
    from terrace.rewards.judging import rules_of_rows

    if args.reward.endswith((".yaml", ".yml")) or Path(args.reward).is_file():
        return dict(stage_with_rewards(args.reward, args.overrides, args.stage).rewards)
    if args.overrides:
        raise InputError(f"{args.overrides[0]!r} changes a recipe, and {args.reward!r} is a rule; give its options by --options JSON")
    if args.reward == EVERY_ROW:
        named = rules_of_rows(args.rows)
        return {key: [RewardRule(name=name, options=options)] for key, (name, options) in named.items()}
    return {args.reward: [RewardRule(name=args.reward, options=args.options)]}
